"""derm generate: a folder that is finished, resumed or refused; every row leads back to the generator."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from derm_pipeline.cli import main
from derm_pipeline.generation import drawing, read_provenance
from derm_pipeline.images import read_image
from derm_pipeline.store import Request
from derm_pipeline_tests.conftest import new_project
from derm_pipeline_tests.generation.networks import generator_at, with_networks


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return generator_at(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def project(tmp_path, networks):
    return with_networks(new_project(tmp_path / "project"), networks)


def derm_generate(project, *arguments):
    told = ["--recipe", "tiny", *arguments, "--data", project.data, "--raw", project.raw]
    return CliRunner().invoke(main, ["generate", *(str(argument) for argument in told)])


def folder_of(result):
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip().rpartition(": ")[2])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ASKED = ("--diagnosis", "Melanoma", "--skin-type", 5, "--count", 11)


def test_images_are_drawn_as_asked_and_lead_back_to_their_generator(project):
    result = derm_generate(project, *ASKED)
    folder = folder_of(result)
    assert folder.parent == project.data / "samples" / "tiny"
    assert "11 images (png)" in result.stdout
    assert {path.name for path in folder.iterdir()} == {"request.json", "metadata.parquet", "README.md", "images"}
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    generator = project.workspace.store.current("generator", "tiny")
    assert {row["prompt"] for row in rows} == {"diagnosis=mel, skin_type=5"}
    assert {row["generator_digest"] for row in rows} == {generator.manifest.content_digest}
    assert [row["sample_id"] for row in rows] == [f"tiny/{folder.name}/{number:06d}" for number in range(11)]
    for row in rows:
        assert read_provenance(folder / row["file_name"])["sample_id"] == row["sample_id"]
        assert read_image(folder / row["file_name"]).shape == (32, 32, 3)
    assert "melanoma (`mel`) | 11 |" in (folder / "README.md").read_text()
    named = json.loads((folder / "request.json").read_text())["generator"]
    reference = "/".join(named[part] for part in ("asset", "partition", "key"))
    assert f"derm lineage {reference}" in (folder / "README.md").read_text()
    walk = CliRunner().invoke(main, ["lineage", reference, "--data", str(project.data)])
    assert walk.exit_code == 0
    assert str(generator.reference) in walk.output


def test_the_same_command_again_does_nothing_and_with_another_batch_size_too(project, monkeypatch):
    folder = folder_of(derm_generate(project, *ASKED))
    before = contents(folder)
    monkeypatch.setattr(drawing.Drawer, "draw", lambda *_: pytest.fail("drawn again"))
    again = derm_generate(project, *ASKED, "--batch-size", 3)
    assert "there already" in again.stdout
    assert folder_of(again) == folder
    assert contents(folder) == before
    monkeypatch.undo()
    assert folder_of(derm_generate(project, *ASKED, "--seed", 9)) != folder
    assert folder_of(derm_generate(project, *ASKED, "--guidance", 1)) != folder


def test_pixels_do_not_depend_on_the_format_or_on_what_else_is_asked_for(project, tmp_path):
    few = folder_of(derm_generate(project, *ASKED[:-1], 4))
    files = [read_image(few / "images" / f"{number:06d}.png") for number in range(4)]
    npz = folder_of(derm_generate(project, *ASKED, "--format", "npz"))
    with np.load(npz / "samples.npz") as loaded:
        images = loaded["arr_0"]
    assert images.shape == (11, 32, 32, 3)
    assert np.array_equal(images[:4], files)
    rows = pq.read_table(npz / "metadata.parquet").to_pylist()
    assert [row["file_name"] for row in rows] == [f"samples.npz#{number}" for number in range(11)]
    shards = folder_of(derm_generate(project, *ASKED, "--format", "parquet"))
    assert pq.read_table(shards / "samples-00000.parquet").num_rows == 11
    for image_format, suffix in (("webp", "webp"), ("jpeg", "jpg")):
        folder = folder_of(derm_generate(project, *ASKED, "--format", image_format, "--out", tmp_path / suffix))
        assert folder == tmp_path / suffix
        assert len(list((folder / "images").glob(f"*.{suffix}"))) == 11


def test_a_grid_has_a_row_a_diagnosis_and_the_same_noise_in_a_column(project):
    arguments = ("--diagnosis", "mel", "--diagnosis", "nv", "--skin-type", 1, "--skin-type", 6, "--count", 2)
    folder = folder_of(derm_generate(project, *arguments, "--format", "grid"))
    assert read_image(folder / "samples.png").shape == (2 * 34 + 2, 4 * 34 + 2, 3)
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    assert [row["diagnosis"] for row in rows] == ["mel"] * 4 + ["nv"] * 4
    assert [row["skin_type"] for row in rows] == [1, 1, 6, 6] * 2
    assert [row["seed"] for row in rows] == [rows[0]["seed"], rows[1]["seed"]] * 4
    everything = folder_of(derm_generate(project, "--format", "grid"))
    assert read_image(everything / "samples.png").shape == (7 * 34 + 2, 34 + 2, 3)


def test_the_autoencoder_is_the_one_that_the_generator_learnt_with(project):
    """A run that was stopped between the two leaves a newer autoencoder beside an older generator."""
    folder = folder_of(derm_generate(project, *ASKED))
    before = contents(folder)
    learnt_with = project.workspace.store.current("autoencoder", "tiny")
    newer = Request("autoencoder", "tiny", {}, {"newer": True}, "1")
    project.workspace.store.obtain(newer, lambda build: build.write_json("autoencoder.json", {}))
    shutil.rmtree(folder)
    assert folder_of(derm_generate(project, *ASKED)) == folder
    assert contents(folder) == before
    shutil.rmtree(learnt_with.directory)
    assert "is gone: run the recipe again" in derm_generate(project, *ASKED, "--seed", 3).stderr


def test_a_finished_folder_asks_for_no_lock_and_what_a_kill_left_in_it_goes(project, monkeypatch):
    folder = folder_of(derm_generate(project, *ASKED))
    before = contents(folder)
    (folder / ".work").mkdir()
    (folder / ".work" / "samples-00000000-0.npy").write_bytes(b"0")
    assert "there already" in derm_generate(project, *ASKED).stdout
    assert contents(folder) == before
    monkeypatch.setattr("fcntl.flock", lambda *_: pytest.fail("locked"))
    assert "there already" in derm_generate(project, *ASKED).stdout


def test_a_folder_that_cannot_be_made_is_said_in_one_line(project, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = derm_generate(project, *ASKED, "--out", tmp_path / "file" / "below")
    assert result.exit_code == 1
    assert result.stderr.startswith("derm: ")
    assert "below cannot be a folder: Not a directory" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_drawn_is_said_in_one_line(project, tmp_path, networks):
    def said(*arguments):
        result = derm_generate(project, *arguments)
        assert result.exit_code == 1, result.output
        assert not (project.data / "samples").exists()
        return result.stderr

    assert "'psoriasis' is not a diagnosis" in said("--diagnosis", "psoriasis")
    assert "mel (melanoma)" in said("--diagnosis", "psoriasis")
    assert "the generator is told ['diagnosis', 'skin_type'] only" in said("--tell", "sex=female")
    assert "say NAME=VALUE" in said("--tell", "sex")
    assert "say NAME=VALUE" in said("--tell", "diagnosis=mel")
    assert "--tell sex: one value" in said("--tell", "sex=female", "--tell", "sex=male")
    assert said("--guidance", "nan").splitlines() == ["derm: --guidance: Input should be a finite number"]
    assert "needs a generator of law ddpm" in said("--solver", "ddpm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "holds other files" in said(*ASKED, "--out", tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"letter.txt": b"dear"}
    folder_of(derm_generate(project, *ASKED, "--out", tmp_path / "asked"))
    assert "holds samples of another request" in said("--diagnosis", "nv", "--out", tmp_path / "asked")
    empty = new_project(tmp_path / "empty")
    assert "generator/tiny is not a finished artifact" in derm_generate(empty, *ASKED).stderr


def test_a_generator_without_skin_types_is_not_asked_for_one(tmp_path):
    networks = generator_at(tmp_path / "networks", conditions=("diagnosis",))
    project = with_networks(new_project(tmp_path / "project"), networks)
    result = derm_generate(project, *ASKED)
    assert result.exit_code == 1
    assert "told ['diagnosis'] only" in result.stderr
    rows = pq.read_table(folder_of(derm_generate(project, "--count", 2)) / "metadata.parquet").to_pylist()
    assert [row["prompt"] for row in rows[:2]] == ["diagnosis=akiec"] * 2


SEEN = ((("mel", "5"), 3), (("mel", None), 4), (("nv", "2"), 6), (("bcc", None), 1))
"""What training images showed: light and dark skin, but never a nevus on dark skin."""


@pytest.fixture
def who_saw(tmp_path):
    """A project whose generator says what its training images showed."""
    return with_networks(new_project(tmp_path / "saw"), generator_at(tmp_path / "networks", seen=SEEN))


def test_what_no_training_image_shows_is_refused_with_what_was_seen(who_saw):
    for arguments, words in (
        (("--diagnosis", "df"), "diagnosis df was never seen: no training image has it"),
        (("--diagnosis", "df"), "ask for bcc, mel, nv"),
        (("--diagnosis", "mel", "--skin-type", 6), "skin_type 6 was never seen"),
        (("--diagnosis", "mel", "--skin-type", 6), "ask for 2, 5"),
    ):
        result = derm_generate(who_saw, *arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (who_saw.data / "samples").exists()


def test_a_combination_that_no_training_image_shows_is_drawn_and_said_in_every_row_and_in_the_card(who_saw):
    asked = ("--diagnosis", "mel", "--diagnosis", "nv", "--skin-type", 5, "--count", 2)
    folder = folder_of(derm_generate(who_saw, *asked))
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    assert [(row["diagnosis"], row["num_train_images"]) for row in rows] == [("mel", 3)] * 2 + [("nv", 0)] * 2
    assert "2 of the 4 samples are of cells without a training image" in (folder / "README.md").read_text()
    folder = folder_of(derm_generate(who_saw, "--diagnosis", "mel", "--diagnosis", "nv"))
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    assert [row["num_train_images"] for row in rows] == [7, 6]
    assert "without a training image" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("output", ["png", "parquet", "npz", "grid", "jpeg"])
def test_every_row_has_the_digest_of_its_pixels_whatever_file_holds_them(output, project):
    folder = folder_of(derm_generate(project, *ASKED[:-1], 3, "--format", output))
    digests = pq.read_table(folder / "metadata.parquet")["pixels_sha256"].to_pylist()
    with np.load(folder_of(derm_generate(project, *ASKED[:-1], 3, "--format", "npz")) / "samples.npz") as archive:
        assert digests == [hashlib.sha256(image.tobytes()).hexdigest() for image in archive["arr_0"]]


def test_more_than_memory_holds_is_refused_before_any_is_drawn(project):
    result = derm_generate(project, "--count", 500_000)
    assert result.exit_code == 1
    assert "3,500,000 samples in all; at most 1,000,000" in result.stderr
    result = derm_generate(project, "--count", 1000, "--format", "grid")
    assert "a grid of 7,000 samples: at most 2,500" in result.stderr
    assert not (project.data / "samples").exists()


def start(project, *arguments):
    code = "from derm_pipeline.cli.generate import generate; generate()"
    told = ["--recipe", "tiny", *arguments, "--data", project.data, "--raw", project.raw]
    return subprocess.Popen([sys.executable, "-c", code, *map(str, told)], env=project.environment())


def test_a_killed_command_is_finished_by_two_that_run_at_once(project, tmp_path):
    arguments = ("--diagnosis", "mel", "--count", 60, "--steps", 40, "--batch-size", 4)
    out = tmp_path / "killed"
    killed = start(project, *arguments, "--out", out)
    deadline = time.monotonic() + 60
    while len(list(out.glob(".work/samples-*.npy"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (out / "metadata.parquet").exists()
    both = [start(project, *arguments, "--out", out) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    whole = folder_of(derm_generate(project, *arguments, "--out", tmp_path / "whole"))
    assert contents(out) == contents(whole)
