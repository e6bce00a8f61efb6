"""The whole graph in miniature: made once, made anew only where something changed, and resumed after being killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from derm_pipeline.captions.metadata import names_unknown
from derm_pipeline.defs.stages import data as stages
from derm_pipeline.defs.stages.data import DESCRIPTORS, HAIR, QUARANTINED, RECORDS, SPLITS
from derm_pipeline.defs.stages.evaluation import sample_images
from derm_pipeline.defs.stages.sets import EVALUATION_SET, TRAINING_SET, VALIDATION_SET
from derm_pipeline.images import encode_jpeg, read_image
from derm_pipeline_tests.conftest import NUM_IMAGES, RECIPE_ASSETS, SOURCE_ASSETS, new_project, run_tiny

pytestmark = pytest.mark.slow

ROW_WISE = ("records", "hair", "descriptors")


def image_of(project, split):
    """The file of an image that is in this split."""
    rows = project.artifacts()["splits"].table(SPLITS).to_pylist()
    image_id = next(row["image_id"] for row in rows if row["split"] == split)
    return project.raw / "phantom" / "images" / f"{image_id}.jpg"


def touch(path):
    """Another image, nearly the same."""
    image = read_image(path)
    image[:4] = 255 - image[:4]
    path.write_bytes(encode_jpeg(image, quality=95))


def finished_at(project):
    return {str(artifact.reference): artifact.manifest.finished for artifact in project.workspace.store.artifacts()}


def test_everything_is_made(finished):
    artifacts = finished.artifacts()
    assert set(artifacts) == {*SOURCE_ASSETS, *RECIPE_ASSETS, "splits", "leaderboard"}
    assert finished.workspace.store.verify() == []
    assert finished.workspace.store.unfinished() == []
    assert artifacts["records"].counts["num_records"] == NUM_IMAGES
    assert artifacts["records"].table(QUARANTINED).num_rows == 0
    rows = [artifacts[name].counts for name in ("training_set", "evaluation_set")]
    assert rows[0]["num_images"] + rows[1]["num_val"] + rows[1]["num_test"] == NUM_IMAGES
    metadata, images = sample_images(artifacts["synthetic_dataset"])
    assert images.shape == (84, 32, 32, 3)
    assert set(np.unique(metadata["diagnosis"].to_pylist(), return_counts=True)[1]) == {12}
    assert not [text for text in metadata["text"].to_pylist() if names_unknown(text)]
    assert metadata["generator_digest"].unique().to_pylist() == [artifacts["generator"].manifest.content_digest]
    page = artifacts["report"].path("report.html").read_text()
    assert "Everything, a few steps each" in page
    assert 'src="http' not in page
    assert "<script src" not in page
    assert "tiny" in artifacts["leaderboard"].path("leaderboard.html").read_text()


def test_nothing_held_out_reaches_the_generator(finished):
    artifacts = finished.artifacts()
    train, held_out = artifacts["training_set"].table(TRAINING_SET), artifacts["evaluation_set"].table(EVALUATION_SET)
    for column in ("image_id", "sha256", "lesion_id", "patient_id"):
        assert not (set(train[column].to_pylist()) & set(held_out[column].to_pylist()) - {None}), column


def test_a_second_run_makes_nothing(finished):
    before = finished_at(finished)
    pointers = {path: path.stat().st_mtime_ns for path in finished.data.glob("store/*/*/current")}
    run_tiny(finished)
    assert finished_at(finished) == before
    assert {path: path.stat().st_mtime_ns for path in finished.data.glob("store/*/*/current")} == pointers


def test_a_changed_held_out_image_rebuilds_what_depends_on_it_and_reuses_every_other_row(project):
    before, path = project.digests(), image_of(project, "test")
    keys = project.keys()
    touch(path)
    run_tiny(project)
    artifacts, after = project.artifacts(), project.digests()
    for asset in ROW_WISE:
        assert artifacts[asset].counts["num_reused"] == NUM_IMAGES - 1, asset
        assert after[asset] != before[asset]
    old = finished_rows(project, keys, path.stem)
    for asset, table in (("records", RECORDS), ("hair", HAIR), ("descriptors", DESCRIPTORS)):
        assert old[asset] == rows_but(artifacts[asset].table(table), artifacts["records"], path.stem), asset
    # The generator never sees it: its inputs are found to be what they were.
    changed = {asset for asset in after if after[asset] != before[asset]}
    remade = {asset for asset, key in project.keys().items() if key != keys[asset]}
    assert {"splits", "evaluation_set", "classifiers", "group_metrics", "report"} <= changed
    assert "fidelity" in remade
    of_the_generator = {"autoencoder", "latents", "generator", "synthetic_dataset"}
    assert not of_the_generator & remade
    assert not {"training_set", *of_the_generator} & changed


def rows_but(table, records, image_id):
    """The rows of all images but one."""
    names = records.table(RECORDS)["image_id"].to_pylist()
    return [row for name, row in zip(names, table.to_pylist(), strict=True) if name != image_id]


def finished_rows(project, keys, image_id):
    store, found = project.workspace.store, {}
    records = store.resolve(f"records/phantom/{keys['records']}")
    for asset, table in (("records", RECORDS), ("hair", HAIR), ("descriptors", DESCRIPTORS)):
        found[asset] = rows_but(store.resolve(f"{asset}/phantom/{keys[asset]}").table(table), records, image_id)
    return found


def test_rows_that_were_reused_are_those_that_would_be_made(project, tmp_path):
    touch(image_of(project, "train"))
    fresh = new_project(tmp_path / "fresh", project.raw)
    for one in (project, fresh):
        for stage in (
            stages.records,
            stages.hair,
            stages.descriptors,
            stages.visual_captions,
            stages.metadata_captions,
        ):
            stage(one.workspace, "phantom")
    for asset in SOURCE_ASSETS:
        digests = [one.workspace.store.current(asset, "phantom").manifest.content_digest for one in (project, fresh)]
        assert digests[0] == digests[1], asset
    assert fresh.workspace.store.current("hair", "phantom").counts["num_reused"] == 0
    assert project.workspace.store.current("hair", "phantom").counts["num_reused"] == NUM_IMAGES - 1


def test_identical_content_with_a_new_time_makes_the_records_again_and_nothing_downstream(project):
    before, keys, made = project.digests(), project.keys(), finished_at(project)
    path = image_of(project, "train")
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    run_tiny(project)
    assert project.digests() == before
    assert {asset for asset, key in project.keys().items() if key != keys[asset]} == {"records"}
    assert len(finished_at(project)) == len(made) + 1
    assert project.workspace.store.prune() == []  # the old records are what everything was made from


def test_bad_files_are_quarantined_and_the_run_goes_on(tmp_path, phantoms):
    shutil.copytree(phantoms, tmp_path / "raw")
    images = tmp_path / "raw" / "phantom" / "images"
    truncated, bomb, empty, missing, *_ = sorted(images.iterdir())
    truncated.write_bytes(truncated.read_bytes()[:-200])
    ok, png = cv2.imencode(".png", np.zeros((30_000, 30_000), np.uint8))
    assert ok
    bomb.unlink()
    bomb.with_suffix(".png").write_bytes(png.tobytes())
    empty.write_bytes(b"")
    missing.unlink()
    (images / "stranger.jpg").write_bytes(truncated.read_bytes())
    project = new_project(tmp_path / "project", tmp_path / "raw")
    done = subprocess.run(derm("run", "tiny"), env=project.environment(), cwd=project.folder, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    artifact = project.artifacts()["records"]
    reasons = {row["image_id"]: row["reason"] for row in artifact.table(QUARANTINED).to_pylist()}
    assert artifact.counts["num_records"] == NUM_IMAGES - 4
    assert set(reasons) == {truncated.stem, bomb.stem, empty.stem, missing.stem, "stranger"}
    assert "truncated" in reasons[truncated.stem]
    assert "pixels" in reasons[bomb.stem]
    assert "zero bytes" in reasons[empty.stem]
    assert "missing on disk" in reasons[missing.stem]
    assert "not in the table" in reasons["stranger"]
    page = project.artifacts()["report"].path("report.html").read_text()
    assert all(image_id in page for image_id in reasons)


def derm(*arguments):
    return [sys.executable, "-m", "derm_pipeline.cli", *arguments]


STAGES = {
    "autoencoder": "store/autoencoder/tiny/.*.partial/.work/checkpoint.safetensors",
    "generator": "store/generator/tiny/.*.partial/.work/checkpoint.safetensors",
    "synthetic_dataset": "store/synthetic_dataset/tiny/.*.partial/.work/samples-*.npy",
}
"""What lies there when a stage is in the middle of its work."""


def kill_in(project, stage, log: Path):
    """Start `derm run tiny` and kill it, with all of its children, in the middle of a stage."""
    with log.open("w") as output:
        process = subprocess.Popen(
            derm("run", "tiny"),
            env=project.environment(),
            cwd=project.folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not list(project.data.glob(STAGES[stage])):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not project.workspace.store.has(stage, "tiny"), f"{stage} was finished before it could be killed"


def test_killed_in_every_heavy_stage_it_resumes_and_ends_with_the_same_artifacts(finished, tmp_path):
    project = new_project(tmp_path / "project", finished.raw)
    for stage in STAGES:
        kill_in(project, stage, tmp_path / f"{stage}.log")
        assert [path.parent.parent.name for path in project.workspace.store.unfinished()] == [stage]
    done = subprocess.run(
        derm("run", "tiny"), env=project.environment(), cwd=project.folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert project.digests() == finished.digests()
    assert project.keys() == finished.keys()
    counts = {asset: artifact.counts for asset, artifact in project.artifacts().items()}
    assert counts["autoencoder"]["resumed_from_step"] >= 5
    assert counts["generator"]["resumed_from_step"] >= 5
    assert finished.artifacts()["generator"].counts["resumed_from_step"] == 0
    assert project.workspace.store.verify() == []
    assert project.workspace.store.unfinished() == []
    lines = done.stdout.splitlines()
    assert any("84 samples" in line for line in lines)
    assert str(project.artifacts()["report"].path("report.html")) in done.stdout


def test_a_u_net_on_a_published_autoencoders_latents_goes_through_the_whole_graph(tmp_path, phantoms):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    autoencoder.save_pretrained(tmp_path / "vae")
    project = new_project(tmp_path / "project", phantoms)
    settings = (project.data / "recipes" / "tiny.yaml").read_text()
    start, end = settings.index("autoencoder:"), settings.index("synthetic_dataset:")
    (project.data / "recipes" / "tiny.yaml").write_text(
        settings[:start]
        + f"autoencoder: {{kind: pretrained, model: {tmp_path / 'vae'}}}\n"
        + "generator: {kind: unet, widths: [8, 16], layers: 1, attention_levels: [1], head_size: 8, norm_groups: 4,\n"
        + "  conditions: [diagnosis, skin_type, sex, age_band, site],\n"
        + "  training: {num_steps: 6, batch_size: 8, lr: 1.0e-3, ema_decay: 0.9}}\n"
        + settings[end:]
    )
    run_tiny(project)
    artifacts = project.artifacts()
    assert artifacts["synthetic_dataset"].counts["num_samples"] == 84
    assert artifacts["autoencoder"].counts["num_steps"] == 0
    assert "weights.safetensors" not in artifacts["autoencoder"].manifest.files
    assert artifacts["report"].path("report.html").stat().st_size > 10_000


def test_a_generator_that_is_told_captions_goes_through_the_whole_graph(tmp_path, phantoms, finished):
    from click.testing import CliRunner

    from derm_pipeline.cli import main
    from derm_pipeline.latents import open_embeddings
    from derm_pipeline.models.tiny import write_tiny_clip_text

    encoder = write_tiny_clip_text(tmp_path / "clip")
    project = new_project(tmp_path / "project", phantoms)
    settings = (project.data / "recipes" / "tiny.yaml").read_text()
    told = f"generator:\n  text: {{encoder: {{model: {encoder}, max_tokens: 40}}, caption: label}}\n"
    (project.data / "recipes" / "tiny.yaml").write_text(settings.replace("generator:\n", told))
    run_tiny(project)
    artifacts, before = project.artifacts(), finished.artifacts()
    # All that comes before is what it is without text, moments included.
    assert artifacts["autoencoder"].manifest.content_digest == before["autoencoder"].manifest.content_digest
    latents = artifacts["latents"]
    shards = [name for name in latents.manifest.files if name.startswith("moments-")]
    assert all(latents.manifest.files[name] == before["latents"].manifest.files[name] for name in shards)
    embeddings = open_embeddings(latents.path("text"))
    captions = artifacts["training_set"].table(TRAINING_SET)["told"].to_pylist()
    watched = artifacts["validation_set"].table(VALIDATION_SET)["told"].to_pylist()
    assert len(embeddings) == len({*captions, *watched}) + 1 == latents.counts["num_texts"] + 1
    metadata, images = sample_images(artifacts["synthetic_dataset"])
    rows = metadata.to_pylist()
    assert images.shape == (84, 32, 32, 3)
    assert {row["text"] for row in rows} <= set(captions)
    assert all(row["prompt"].endswith(f", text={row['text']}") for row in rows)
    shown = {}
    for row in rows:
        shown.setdefault(row["diagnosis"], set()).add(row["text"])
    assert all(len(texts) == 1 for texts in shown.values())  # the label, and nothing of another diagnosis
    assert len(set.union(*shown.values())) == 7

    def generate(*arguments):
        paths = ["--data", str(project.data), "--raw", str(phantoms)]
        done = CliRunner().invoke(main, ["generate", "--recipe", "tiny", *arguments, *paths])
        return done.exit_code, done.output

    code, said = generate("--prompt", "A dermoscopic image of melanoma on the back.", "--count", "2")
    assert code == 0, said
    assert "2 images" in said
    code, said = generate("--diagnosis", "mel", "--prompt", "very " * 60)
    assert code == 1
    assert "tokens; 40 can be told: shorten it" in said
    check_plans_of_prompts(project)
    shutil.rmtree(encoder)
    code, said = generate("--diagnosis", "mel", "--count", "3")  # a caption that is known needs no encoder
    assert code == 0, said
    code, said = generate("--diagnosis", "mel", "--prompt", "a blue one")
    assert code == 1
    assert str(encoder) in said
    project.workspace.store.prune()
    assert project.workspace.store.verify() == []


def check_plans_of_prompts(project):
    """The generator that is told text is asked in every plan's way; only its samples are made anew."""
    from derm_pipeline.defs.stages.generator import synthetic_dataset

    path = project.data / "recipes" / "tiny.yaml"
    before = path.read_text()
    images = {row["sha256"]: row for row in project.artifacts()["training_set"].table(TRAINING_SET).to_pylist()}

    def drawn(plan):
        rest = [line for line in before.splitlines() if not line.startswith("synthetic_dataset:")]
        path.write_text("\n".join([*rest, f"synthetic_dataset: {{batch_size: 16, {plan}}}", ""]))
        artifact = synthetic_dataset(project.workspace, "tiny")
        return artifact, artifact.table("metadata.parquet").to_pylist()

    asked = "plan: img2img, num_steps: 4, max_images: 6, samples_each: 2, strength: 0.5"
    artifact, rows = drawn(asked)
    assert artifact.counts["num_samples"] == len(rows) == 12
    assert {row["skin_type"] for row in rows} <= {5, 6}
    for row in rows:
        assert row["diagnosis"] == images[row["source_sha256"]]["diagnosis"]
        assert row["measured_tone"] in ("light", "medium", "dark")
        assert row["prompt"].startswith("An image of ")
    to_change = [row for row in rows if row["source_tone"] != "dark"]
    assert artifact.counts["num_tone_to_change"] == len(to_change)
    assert artifact.counts["num_tone_unchanged"] == sum(not row["tone_changed"] for row in to_change)
    assert f"**{artifact.counts['num_tone_unchanged']} did not change it**" in artifact.path("README.md").read_text()
    kept, kept_rows = drawn(f"{asked}, lesion: kept")
    assert all(0 < row["kept_fraction"] < 1 for row in kept_rows)
    assert kept.manifest.content_digest != artifact.manifest.content_digest
    _, rows = drawn("plan: lesiongen, num_samples: 14, guidances: [1, 2], steps: [2, 3]")
    assert {row["guidance"] for row in rows} == {1, 2}
    assert all(row["prompt"] == row["text"] and " skin tone" in row["prompt"] for row in rows)
    _, rows = drawn("plan: captions, num_samples: 14, num_steps: 2")
    assert {row["prompt"] for row in rows} <= {row["told"] for row in images.values()}
    _, rows = drawn('plan: prompts, diagnosis: mel, samples_each: 2, prompts: ["a mole --s 2 --n blurry --d 8"]')
    assert [(row["num_steps"], row["negative_prompt"], row["diagnosis"]) for row in rows] == [(2, "blurry", "mel")] * 2
    assert rows[0]["seed"] == 8
    path.write_text(before)
