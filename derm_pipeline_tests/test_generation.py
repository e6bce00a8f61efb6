"""Samples: the right number of each, each its own, all of them traceable and readable by others."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from derm_pipeline.captions.metadata import names_unknown
from derm_pipeline.generation import (
    SampleRequest,
    SamplingConfig,
    captions_of,
    dataset_card,
    draw_samples,
    plan_samples,
    sample_seed,
    write_dataset,
)
from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.generator import GeneratorSpec, save_autoencoder
from derm_pipeline.models.laws import RectifiedFlow
from derm_pipeline.models.runtime import save_weights
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.store import write_table

SEVEN = tuple(Diagnosis)[:7]
CLASSES = {
    "diagnosis": tuple(diagnosis.value for diagnosis in SEVEN),
    "skin_type": tuple(str(skin_type.value) for skin_type in SkinType),
}
CELLS = [(diagnosis, skin_type) for diagnosis in SEVEN for skin_type in (None, *SkinType)]


def tally(requests, cells):
    return {cell: sum((request.diagnosis, request.skin_type) == cell for request in requests) for cell in cells}


@given(st.integers(1, 2000), st.lists(st.sampled_from(SkinType), unique=True))
@settings(max_examples=30, deadline=None)
def test_balanced_samples_differ_by_one_at_most_in_every_cell_and_every_diagnosis(num_samples, skin_types):
    requests = plan_samples(SamplingConfig(num_samples=num_samples, skin_types=tuple(skin_types)), SEVEN, {})
    cells = [(diagnosis, skin_type) for diagnosis in SEVEN for skin_type in (skin_types or [None])]
    by_cell = tally(requests, cells)
    assert sum(by_cell.values()) == len(requests) == num_samples
    assert max(by_cell.values()) - min(by_cell.values()) <= 1
    by_diagnosis = [sum(request.diagnosis == diagnosis for request in requests) for diagnosis in SEVEN]
    assert max(by_diagnosis) - min(by_diagnosis) <= 1


@given(
    st.integers(1, 1500),
    st.lists(st.sampled_from(SkinType), unique=True),
    st.dictionaries(st.sampled_from(CELLS), st.integers(1, 500)),
)
@settings(max_examples=60, deadline=None)
def test_filling_up_is_in_proportion_to_what_each_cell_lacks(num_samples, skin_types, train_counts):
    config = SamplingConfig(plan="fill", num_samples=num_samples, skin_types=tuple(skin_types))
    requests = plan_samples(config, SEVEN, train_counts)
    assert len(requests) == num_samples
    if skin_types:
        there = {(d, s): train_counts.get((d, s), 0) for d in SEVEN for s in skin_types}
    else:
        there = {(d, None): sum(n for (other, _), n in train_counts.items() if other == d) for d in SEVEN}
    found = tally(requests, there)
    assert sum(found.values()) == num_samples
    lacking = {cell: max(there.values()) - count for cell, count in there.items()}
    total = sum(lacking.values())
    for cell, count in found.items():
        share = num_samples * lacking[cell] / total if total else num_samples / len(there)
        assert abs(count - share) < 1 + 1e-6
        assert count == 0 or lacking[cell] > 0 or total == 0  # the fullest cell gets nothing


def test_samples_are_numbered_and_seeded_in_order():
    requests = plan_samples(SamplingConfig(num_samples=500, seed=3), SEVEN, {})
    assert [request.number for request in requests] == list(range(500))
    assert [request.seed for request in requests] == [sample_seed(3, number) for number in range(500)]
    assert len({request.seed for request in requests}) == 500
    assert all(0 <= request.seed < 2**63 for request in requests)
    assert requests[7].file_name == "images/000007.png"
    assert requests != plan_samples(SamplingConfig(num_samples=500, seed=4), SEVEN, {})


def test_captions_name_no_unknown():
    requests = [SampleRequest(0, 0, *cell) for cell in CELLS]
    captions = captions_of(requests)
    assert not [caption for caption in captions if names_unknown(caption)]
    assert all(r.diagnosis.phrase in caption for r, caption in zip(requests, captions, strict=True))
    assert len(set(captions)) == len(CELLS)


def generator_at(folder, conditions=("diagnosis", "skin_type")):
    """A random network, moved off its all-zero start, and a random autoencoder of 32 px."""
    torch.manual_seed(11)
    network = DiTConfig(
        latent_size=8, width=32, depth=2, heads=2, conditions={name: len(CLASSES[name]) for name in conditions}
    )
    model = DiT(network)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    told = {name: CLASSES[name] for name in conditions}
    spec = GeneratorSpec(
        network=network, law=RectifiedFlow(), classes=told, latent_mean=(0.1,) * 4, latent_std=(1.0, 2.0, 0.5, 1.0)
    )
    for name in ("generator", "autoencoder"):
        (folder / name).mkdir()
    spec.save(folder / "generator")
    save_weights(folder / "generator" / "weights.safetensors", model.state_dict())
    save_autoencoder(Autoencoder(AutoencoderConfig(width=8, num_blocks=1)), folder / "autoencoder")
    return {name: folder / name for name in ("generator", "autoencoder")}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return generator_at(tmp_path_factory.mktemp("networks"))


def config_of(**changes):
    return SamplingConfig(**{"num_samples": 21, "num_steps": 3, "batch_size": 8} | changes)


def draw(requests, config, networks, work, on_progress=None):
    work.mkdir(exist_ok=True)
    return draw_samples(requests, config, **networks, work=work, on_progress=on_progress)


def test_a_sample_depends_on_its_own_seed_and_prompt_only(networks, tmp_path):
    requests = plan_samples(config_of(), SEVEN, {})
    images = draw(requests, config_of(), networks, tmp_path / "a")
    assert images.shape == (21, 32, 32, 3)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 21
    order = random.Random(5).sample(range(21), 13)
    others = [dataclasses.replace(requests[place], number=position) for position, place in enumerate(order)]
    again = draw(others, config_of(batch_size=5), networks, tmp_path / "b")
    difference = np.abs(again.astype(int) - images[order].astype(int))
    assert difference.max() <= 1
    # ... and it does depend on those
    changed = [dataclasses.replace(requests[0], seed=1), dataclasses.replace(requests[0], diagnosis=Diagnosis.VASC)]
    different = draw(changed, config_of(), networks, tmp_path / "c")
    assert all(np.abs(image.astype(int) - images[0]).max() > 3 for image in different)


def test_an_interrupted_drawing_goes_on_where_it_was_and_gives_the_same(networks, tmp_path):
    requests = plan_samples(config_of(), SEVEN, {})
    whole = draw(requests, config_of(), networks, tmp_path / "whole")

    def stop(done, total):
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(requests, config_of(), networks, tmp_path / "cut", stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    assert len(kept) == 2
    told = []
    resumed = draw(requests, config_of(), networks, tmp_path / "cut", lambda *progress: told.append(progress))
    assert np.array_equal(resumed, whole)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
    assert told == [(8, 21), (16, 21), (21, 21)]


def test_a_generator_is_not_asked_for_what_it_is_not_told(tmp_path):
    networks = generator_at(tmp_path, conditions=("diagnosis",))
    with pytest.raises(ValueError, match=r"\['diagnosis', 'skin_type'\].*told \['diagnosis'\] only"):
        draw(plan_samples(config_of(), SEVEN, {}), config_of(), networks, tmp_path / "work")
    config = config_of(skin_types=())
    assert len(draw(plan_samples(config, SEVEN, {}), config, networks, tmp_path / "work")) == 21


@pytest.fixture
def dataset(tmp_path):
    """A folder as the synthetic_dataset stage writes it, its images and its requests."""
    config = config_of(guidance=1.25, num_steps=9)
    requests = plan_samples(config, SEVEN, {})
    images = np.random.default_rng().integers(0, 256, (21, 16, 16, 3), np.uint8)
    (tmp_path / "images").mkdir()
    metadata = write_dataset(
        requests,
        images,
        config,
        recipe="tiny",
        generator_digest="a" * 64,
        autoencoder_digest="b" * 64,
        write_bytes=lambda name, content: (tmp_path / name).write_bytes(content),
    )
    write_table(tmp_path / "metadata.parquet", metadata)
    (tmp_path / "README.md").write_text(dataset_card("tiny", requests, licences=["Phantoms: Apache-2.0"], size_px=16))
    return tmp_path, requests, images, metadata


def test_the_dataset_is_read_by_others_with_every_column(dataset, tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    folder, requests, images, metadata = dataset
    cache = tmp_path_factory.mktemp("cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(cache), split="train")
    assert set(loaded.column_names) == {"image", *metadata.column_names} - {"file_name"}
    assert loaded.num_rows == 21
    by_id = {row["sample_id"]: row for row in loaded}
    for request, image, row in zip(requests, images, metadata.to_pylist(), strict=True):
        found = by_id[f"tiny/{request.number:06d}"]
        assert np.array_equal(np.asarray(found.pop("image")), image)
        assert found == {name: value for name, value in row.items() if name != "file_name"}
        assert found["seed"] == request.seed


def test_every_png_tells_where_it_came_from(dataset):
    folder, requests, _, metadata = dataset
    for request, row in zip(requests, metadata.to_pylist(), strict=True):
        with Image.open(folder / request.file_name) as image:
            chunks = dict(image.text)
        assert chunks == {
            f"derm_pipeline:{name}": str(row[name])
            for name in ("sample_id", "text", "prompt", "seed", "guidance", "num_steps", "solver", "generator_digest")
        }
        assert chunks["derm_pipeline:prompt"] == f"diagnosis={row['diagnosis']}, skin_type={row['skin_type']}"


def test_the_card_counts_and_names_the_licences(dataset):
    import yaml

    folder, requests, *_ = dataset
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pretty_name"] == "Synthetic skin lesions (tiny)"
    assert "Phantoms: Apache-2.0" in card
    for diagnosis in SEVEN:
        count = sum(request.diagnosis == diagnosis for request in requests)
        assert f"(`{diagnosis.value}`) | {count} |" in card
