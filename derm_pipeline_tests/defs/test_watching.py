"""A training is watched on val images only, and what is seen of it is in its artifact and its report."""

import numpy as np
import pyarrow as pa
import pytest

from derm_pipeline.defs.stages import sets
from derm_pipeline.defs.stages.data import SPLITS
from derm_pipeline.defs.stages.generator import generator
from derm_pipeline.defs.stages.sets import EVALUATION_SET, TRAINING_SET, VALIDATION_SET, validation_set
from derm_pipeline.defs.stages.summary import last_grid, loss_curve, loss_picture
from derm_pipeline.defs.stages.watching import LOSSES, VALIDATION, grids, validation_moments
from derm_pipeline.latents import open_moments
from derm_pipeline.models.runtime import load_weights

pytestmark = pytest.mark.slow  # they look at a finished run


def test_the_validation_set_is_of_the_split_val_and_of_nothing_else(finished):
    artifacts = finished.artifacts()
    split_of = {row["image_id"]: row["split"] for row in artifacts["splits"].table(SPLITS).to_pylist()}
    rows = artifacts["validation_set"].table(VALIDATION_SET)
    assert {split_of[image_id] for image_id in rows["image_id"].to_pylist()} == {"val"}
    judged = artifacts["evaluation_set"].table(EVALUATION_SET)
    test = judged.filter(pa.array([split == "test" for split in judged["split"].to_pylist()]))
    train = artifacts["training_set"].table(TRAINING_SET)
    for column in ("image_id", "sha256", "lesion_id", "patient_id"):
        own = set(rows[column].to_pylist()) - {None}
        assert own
        assert not own & set(test[column].to_pylist()), column
        assert not own & set(train[column].to_pylist()), column
    val = judged.filter(pa.array([split == "val" for split in judged["split"].to_pylist()]))
    assert rows["image_id"].to_pylist() == val["image_id"].to_pylist()  # fewer than the most
    assert set(rows["diagnosis"].to_pylist()) <= set(train["diagnosis"].to_pylist())


def test_of_many_val_images_those_of_the_smallest_digests_are_taken(project, monkeypatch):
    everything = project.artifacts()["validation_set"].table(VALIDATION_SET)
    monkeypatch.setattr(sets, "MOST_VALIDATED", 5)
    few = validation_set(project.workspace, "tiny")
    assert few.counts["num_images"] == 5
    assert few.counts["num_val"] == everything.num_rows
    digests = few.table(VALIDATION_SET)["sha256"].to_pylist()
    assert sorted(digests) == sorted(everything["sha256"].to_pylist())[:5]
    assert digests == [digest for digest in everything["sha256"].to_pylist() if digest in digests]


def test_the_moments_of_val_images_lie_apart_from_those_that_are_learnt(finished):
    artifacts = finished.artifacts()
    rows, learnt = artifacts["validation_set"].table(VALIDATION_SET), artifacts["training_set"].table(TRAINING_SET)
    moments = validation_moments(artifacts["latents"], rows)
    digests, trained_on = open_moments(artifacts["latents"].directory)
    assert digests == learnt["sha256"].to_pylist()
    assert moments.shape == (rows.num_rows, *trained_on.shape[1:])
    assert open_moments(artifacts["latents"].path(VALIDATION))[0] == rows["sha256"].to_pylist()
    with pytest.raises(ValueError, match="materialise latents again"):
        validation_moments(artifacts["latents"], rows.slice(1))
    assert validation_moments(artifacts["latents"], rows.slice(0, 0)) is None


@pytest.mark.parametrize(("asset", "steps"), [("autoencoder", 20), ("generator", 40)])
def test_the_artifact_holds_the_curve_with_losses_on_val_images(finished, asset, steps):
    artifacts = finished.artifacts()
    artifact, num_val = artifacts[asset], artifacts["validation_set"].counts["num_images"]
    table = artifact.table(LOSSES)
    assert table["step"].to_pylist() == list(range(1, steps + 1))
    curve = loss_curve(artifact)
    assert curve.validation_steps.tolist() == list(range(steps // 10, steps + 1, steps // 10))
    assert np.isfinite(curve.validation_losses).all()
    assert curve.num_validation_images == artifact.counts["num_validation_images"] == num_val
    assert artifact.counts["validation_loss"] == pytest.approx(curve.validation_losses[-1], abs=1e-4)
    assert artifact.counts["images_per_s"] > 0
    assert loss_picture(artifact).ndim == 3


def test_the_generator_keeps_samples_on_the_way_and_the_report_shows_all_of_it(finished):
    artifacts = finished.artifacts()
    found = grids(artifacts["generator"])
    assert list(found) == [14, 28, 40]
    assert {picture.shape for picture in found.values()} == {(7 * 34 + 2, 2 * 34 + 2, 3)}
    assert (last_grid(artifacts["generator"]) == found[40]).all()
    page = artifacts["report"].path("report.html").read_text()
    num_val = artifacts["validation_set"].counts["num_images"]
    assert f"validation, n = {num_val} images" in page
    assert page.count('class="curve dot s-synthetic"') == 2  # of autoencoder and generator
    assert [step for step in (14, 28, 40) if f"samples after step {step}: akiec, bcc" in page] == [14, 28, 40]


def test_not_watched_the_generator_has_the_same_weights(project, monkeypatch):
    watched = project.artifacts()["generator"]
    own = project.data / "recipes" / "tiny.yaml"
    own.write_text(own.read_text().replace("  width: 32\n", "  width: 32\n  grid: null\n"))
    monkeypatch.setattr("derm_pipeline.defs.stages.generator.validation_moments", lambda *_: None)
    plain = generator(project.workspace, "tiny")
    assert plain.manifest.key != watched.manifest.key
    assert grids(plain) == {}
    assert not len(loss_curve(plain).validation_steps)
    assert plain.table(LOSSES)["loss"].to_pylist() == watched.table(LOSSES)["loss"].to_pylist()
    for name in ("weights.safetensors", "ema.safetensors"):
        one, two = (load_weights(artifact.path(name)) for artifact in (plain, watched))
        assert all((one[key] == two[key]).all() for key in one)


def test_event_files_go_where_they_are_wanted_and_change_no_artifact(project, tmp_path):
    from dataclasses import replace

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = project.artifacts()["generator"]
    workspace = replace(project.workspace, tensorboard=tmp_path / "events")
    before.path("manifest.json").unlink()  # so it is made again
    again = generator(workspace, "tiny")
    assert again.manifest.content_digest == before.manifest.content_digest
    found = EventAccumulator(str(tmp_path / "events" / "tiny" / "generator"))
    found.Reload()
    curve = loss_curve(again)
    told = {event.step: event.value for event in found.Scalars("validation_loss")}
    assert list(told) == curve.validation_steps.tolist()
    assert list(told.values()) == pytest.approx(curve.validation_losses, rel=1e-6)
    assert [event.step for event in found.Images("samples")] == [14, 28, 40]
