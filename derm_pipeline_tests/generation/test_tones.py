"""The tone that samples really have stands in their rows, beside that which was asked for; the card counts them."""

import json

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from derm_pipeline.generation import (
    Begun,
    LesionGenSampling,
    Origin,
    Prompting,
    SampleRequest,
    SamplingConfig,
    dataset_card,
    encoded,
    plan_requests,
    provenance_rows,
    read_provenance,
    tone_counts,
    write_dataset,
    write_shards,
)
from derm_pipeline.generation.files import metadata_table
from derm_pipeline.generation.tones import measured_columns, measured_tones
from derm_pipeline.records import Diagnosis, SkinTone, SkinType
from derm_pipeline_tests.generation.networks import SEVEN

DIGESTS = {"generator_digest": "a" * 64, "autoencoder_digest": "b" * 64}


def skin(ita_deg, size=64):
    """A picture of one colour: skin of this angle, with a black lesion in the middle."""
    radians = np.radians(ita_deg)
    lab = np.float32([[[50 + 30 * np.sin(radians), 0, 30 * np.cos(radians)]]])
    colour = np.clip(np.round(255 * cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)), 0, 255).astype(np.uint8)
    image = np.broadcast_to(colour, (size, size, 3)).copy()
    cv2.circle(image, (size // 2, size // 2), size // 6, (20, 10, 10), -1)
    return image


ANGLES = {SkinType.I: 62, SkinType.II: 48, SkinType.III: 34, SkinType.IV: 19, SkinType.V: -10, SkinType.VI: -45}


@pytest.mark.parametrize("size", [32, 64, 200])
def test_the_tone_of_skin_is_measured_around_the_lesion_at_any_size(size):
    found = measured_tones([skin(angle, size) for angle in ANGLES.values()])
    assert [tone.skin_type for tone in found] == list(ANGLES)
    assert [tone.tone for tone in found] == [skin_type.tone for skin_type in ANGLES]
    for tone, angle in zip(found, ANGLES.values(), strict=True):
        assert tone.ita_deg == pytest.approx(angle, abs=3)
    assert measured_tones([np.zeros((size, size, 3), np.uint8)])[0] == (None, None)
    assert measured_tones([]) == []


def begun_from(number, sha256, target=SkinType.VI, *, keeps=False):
    how = Prompting(origin=Origin(sha256, 0.5, keeps), target_tone=target.tone)
    return SampleRequest(number, number, Diagnosis.MEL, target, text="An image of mel-class", prompting=how)


LESION = np.zeros((64, 64), bool)
LESION[:16] = True
IMAGES = {
    "light": Begun(skin(ANGLES[SkinType.II]), LESION),
    "dark": Begun(skin(ANGLES[SkinType.V]), None),
    "black": Begun(np.zeros((64, 64, 3), np.uint8), None),
}
CASES = [
    # source, measured skin type of the sample, tone_changed
    ("light", SkinType.VI, True),
    ("light", SkinType.I, False),
    ("light", SkinType.IV, True),
    ("dark", SkinType.VI, False),
    ("black", SkinType.VI, None),
]


def rows_of(cases=CASES):
    requests = [begun_from(number, source) for number, (source, *_) in enumerate(cases)]
    images = np.stack([skin(ANGLES[skin_type]) for _, skin_type, _ in cases])
    return requests, images, measured_columns(requests, images, IMAGES.__getitem__)


def test_a_row_says_the_tone_of_the_sample_and_of_its_image_and_whether_they_differ():
    _, _, rows = rows_of()
    for row, (source, skin_type, changed) in zip(rows, CASES, strict=True):
        assert row["measured_skin_type"] == skin_type.value
        assert row["measured_tone"] == skin_type.tone
        assert row["source_tone"] == {"light": SkinTone.LIGHT, "dark": SkinTone.DARK, "black": None}[source]
        assert row["tone_changed"] is changed
        assert row["kept_fraction"] == (0.25 if source == "light" else 0)


def test_samples_whose_tone_was_to_change_and_did_not_are_counted_and_the_card_says_so():
    requests, images, _ = rows_of()
    told = {"write_bytes": lambda *_: None, "read_origin": IMAGES.__getitem__}
    table = write_dataset(requests, images, SamplingConfig(), recipe="r", **DIGESTS, **told)
    counts = tone_counts(table.to_pylist())
    assert counts == {
        "num_tone_asked": 5,
        "num_tone_reached": 3,
        "num_tone_unseen": 0,
        "num_tone_to_change": 3,
        "num_tone_unchanged": 1,
    }
    card = dataset_card("r", requests, licences=["own"], size_px=(64, 32), tones=counts)
    assert "of 5 images that were asked for by tone, 3 have it" in card
    assert "Of 3 that began from an image of another tone, **1 did not change it**" in card
    assert "images of 64 x 32 px" in card
    assert "Skin tone" not in dataset_card("r", requests, licences=["own"], size_px=64)


def test_samples_of_prompts_from_noise_are_counted_without_their_images():
    requests = plan_requests(LesionGenSampling(num_samples=6), SEVEN, {})
    images = [skin(ANGLES[skin_type]) for skin_type in SkinType]
    targets = [request.prompting.target_tone for request in requests]
    measured = measured_columns(requests, images)
    rows = [one | {"target_tone": target} for one, target in zip(measured, targets, strict=True)]
    assert all(row["tone_changed"] is None and row["source_tone"] is None for row in rows)
    reached = sum(tone == skin_type.tone for tone, skin_type in zip(targets, SkinType, strict=True))
    assert tone_counts(rows) == {"num_tone_asked": 6, "num_tone_reached": reached, "num_tone_unseen": 0}
    assert tone_counts([{"target_tone": None}]) == {}


def test_what_does_not_go_together_is_refused():
    requests, images, _ = rows_of()
    with pytest.raises(ValueError, match="4 images for 5 samples"):
        measured_columns(requests, images[:4], IMAGES.__getitem__)
    with pytest.raises(ValueError, match="pass what reads those"):
        measured_columns(requests, images)


def test_every_setting_of_a_prompt_stands_in_the_row_the_file_and_the_shard(tmp_path):
    requests, images, measured = rows_of()
    how = Prompting("a drawing", 3.0, 7, target_tone=SkinTone.LIGHT)
    requests[0] = SampleRequest(0, 0, Diagnosis.NV, None, text="a nevus", prompting=how)
    config = SamplingConfig(guidance=2.0, num_steps=50)
    rows = provenance_rows(requests, config, recipe="r", **DIGESTS, pixels=["c" * 64] * 5, measured=measured)
    first, second = rows[:2]
    assert (first["prompt"], first["text"], first["negative_prompt"]) == ("a nevus", "a nevus", "a drawing")
    assert (first["guidance"], first["num_steps"], first["seed"]) == (3.0, 7, 0)
    assert (first["source_sha256"], first["strength"], first["target_tone"]) == (None, None, "light")
    assert (second["guidance"], second["num_steps"], second["negative_prompt"]) == (2.0, 50, None)
    assert (second["source_sha256"], second["strength"], second["target_tone"]) == ("light", 0.5, "dark")
    assert metadata_table(rows).to_pylist() == rows
    for row, content in encoded(images, rows):
        path = tmp_path / "one.png"
        path.write_bytes(content)
        told = read_provenance(path)
        assert told.get("negative_prompt") == row["negative_prompt"]
        assert told.get("source_sha256") == row["source_sha256"]
        assert told["measured_tone"] == row["measured_tone"]
    shards = pq.read_table(write_shards(encoded(images, rows), tmp_path, shard_size=10)[0])
    assert shards.drop_columns(["image"]).to_pylist() == rows
    features = json.loads(shards.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["tone_changed"] == {"dtype": "bool", "_type": "Value"}


def test_rows_of_samples_without_prompts_are_what_they_were():
    requests = plan_requests(SamplingConfig(num_samples=8), SEVEN, {})
    rows = provenance_rows(requests, SamplingConfig(), recipe="r", **DIGESTS, pixels=["c" * 64] * 8)
    assert "measured_tone" not in metadata_table(rows).column_names
    images = np.zeros((8, 8, 8, 3), np.uint8)
    table = write_dataset(requests, images, SamplingConfig(), recipe="r", **DIGESTS, write_bytes=lambda *_: None)
    assert table.column_names == metadata_table(rows).column_names
