"""Samples as files: readable by others, traceable from a single file, in every format."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from derm_pipeline.generation import (
    SamplingConfig,
    dataset_card,
    encode_sample,
    encoded,
    plan_samples,
    provenance_rows,
    read_provenance,
    write_dataset,
    write_grid,
    write_npz,
    write_shards,
)
from derm_pipeline.images import read_image
from derm_pipeline.store import write_table
from derm_pipeline_tests.generation.networks import SEVEN

ESSENTIALS = ("sample_id", "text", "prompt", "seed", "guidance", "num_steps", "solver", "generator_digest")


def config_of(**changes):
    return SamplingConfig(**{"num_samples": 21, "num_steps": 3, "batch_size": 8} | changes)


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
        assert row["pixels_sha256"] == hashlib.sha256(image.tobytes()).hexdigest()
        found = by_id[f"tiny/{request.number:06d}"]
        assert np.array_equal(np.asarray(found.pop("image")), image)
        assert found == {name: value for name, value in row.items() if name != "file_name"}
        assert found["seed"] == request.seed


def test_every_png_tells_where_it_came_from(dataset):
    folder, requests, _, metadata = dataset
    for request, row in zip(requests, metadata.to_pylist(), strict=True):
        with Image.open(folder / request.file_name) as image:
            chunks = dict(image.text)
        assert chunks == {f"derm_pipeline:{name}": str(row[name]) for name in ESSENTIALS}
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


def rows_of(num, **changes):
    config = config_of(num_samples=num, **changes)
    return provenance_rows(
        plan_samples(config, SEVEN, {}),
        config,
        recipe="tiny",
        generator_digest="a" * 64,
        autoencoder_digest="b" * 64,
        pixels=["c" * 64] * num,
    )


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_file_in_any_format_tells_where_it_came_from(image_format, tmp_path):
    image = np.random.default_rng().integers(0, 256, (24, 17, 3), np.uint8)
    row = rows_of(1, image_format=image_format)[0]
    path = tmp_path / row["file_name"].rpartition("/")[2]
    assert path.suffix == {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}[image_format]
    path.write_bytes(encode_sample(image, row, image_format, 90))
    assert read_provenance(path) == {name: str(row[name]) for name in ESSENTIALS}
    assert encode_sample(image, row, image_format, 90) == path.read_bytes()
    with Image.open(path) as opened:
        assert opened.format == image_format.upper()
        found = np.asarray(opened.convert("RGB"))
    if image_format == "jpeg":
        assert 0 < np.abs(found.astype(int) - image).mean() < 25
        assert read_image(path).shape == image.shape
    else:
        assert np.array_equal(found, image)


def test_a_file_of_somebody_else_tells_nothing(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        assert read_provenance(tmp_path / name) == {}


def test_jpeg_quality_is_heeded():
    image = np.random.default_rng().integers(0, 256, (64, 64, 3), np.uint8)
    row = rows_of(1)[0]
    assert len(encode_sample(image, row, "jpeg", 30)) < len(encode_sample(image, row, "jpeg", 95)) / 2


def test_shards_are_read_by_others_with_pictures_and_rows(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    images = np.random.default_rng().integers(0, 256, (23, 8, 8, 3), np.uint8)
    rows = rows_of(23)
    paths = write_shards(encoded(images, rows), tmp_path, shard_size=10)
    assert [pq.read_metadata(path).num_rows for path in paths] == [10, 10, 3]
    loaded = datasets.load_dataset(
        "parquet", data_files=[str(path) for path in paths], cache_dir=str(tmp_path / "cache"), split="train"
    )
    for image, row, found in zip(images, rows, loaded, strict=True):
        assert np.array_equal(np.asarray(found.pop("image")), image)
        assert found == row


def test_the_npz_is_what_adms_evaluator_reads_and_is_written_batch_by_batch(tmp_path):
    images = np.random.default_rng().integers(0, 256, (50, 6, 6, 3), np.uint8)
    write_npz(tmp_path / "a.npz", (images[start : start + 7] for start in range(0, 50, 7)), 50)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0"]
        assert loaded["arr_0"].dtype == np.uint8
        assert np.array_equal(loaded["arr_0"], images)
    write_npz(tmp_path / "b.npz", [images], 50)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_npz_of_another_number_or_size_is_not_written(tmp_path):
    images = np.zeros((4, 6, 6, 3), np.uint8)
    for batches, num, words in (
        ([images], 5, "4 samples"),
        ([], 0, "0 samples"),
        ([images, images[:, :3]], 8, "first"),
    ):
        with pytest.raises(ValueError, match=words):
            write_npz(tmp_path / "a.npz", batches, num)
    assert not (tmp_path / "a.npz").exists()


def test_a_grid_has_its_samples_row_by_row(tmp_path):
    images = np.random.default_rng().integers(0, 255, (6, 8, 8, 3), np.uint8)
    write_grid(tmp_path / "a.png", images, columns=3)
    grid = read_image(tmp_path / "a.png")
    assert grid.shape == (22, 32, 3)
    assert np.array_equal(grid[2:10, 12:20], images[1])
    assert np.array_equal(grid[12:20, 2:10], images[3])
