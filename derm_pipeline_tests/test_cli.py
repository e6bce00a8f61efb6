"""derm: help that teaches, and one clear line for whatever a user can do wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from derm_pipeline.cli import main, user_errors
from derm_pipeline.defs.stages import summary
from derm_pipeline.sources import SOURCES
from derm_pipeline.store import MANIFEST
from derm_pipeline_tests.conftest import NUM_IMAGES, new_project

COMMANDS = ("run", "sources", "recipes", "lineage", "verify", "prune", "report")
SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "lineage.schema.json").read_text())


@pytest.fixture
def derm(monkeypatch):
    """Run the command line in this process."""
    for name in ("DERM_DATA", "DERM_RAW", "DERM_TENSORBOARD", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, project=None):
        if project is not None:
            monkeypatch.chdir(project.folder)
            arguments = [*arguments, "--data", str(project.data), "--raw", str(project.raw)]
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def empty(tmp_path):
    """A project that has nothing but the recipe tiny."""
    return new_project(tmp_path / "empty")


def run_derm(project, *arguments):
    """The command line as a process, as a user has it."""
    return subprocess.run(
        [sys.executable, "-m", "derm_pipeline.cli", *arguments],
        env=project.environment(),
        cwd=project.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def the_line(result):
    """The only line that a failed command says."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("derm: ")]
    assert len(lines) == 1, result.output
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize("wanted", ["flag", "variable"])
def test_event_files_without_tensorboard_are_refused_before_any_work(derm, empty, monkeypatch, wanted):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    if wanted == "variable":
        monkeypatch.setenv("DERM_TENSORBOARD", str(empty.folder / "events"))
    result = derm("run", "tiny", *(["--tensorboard"] if wanted == "flag" else []), project=empty)
    assert "pip install 'derm_pipeline[tensorboard]'" in the_line(result)
    assert [path.name for path in empty.data.iterdir()] == ["recipes"]


@pytest.mark.parametrize(
    ("variable", "flag", "folder"),
    [(None, False, None), (None, True, "data/tensorboard"), ("events", False, "events"), ("events", True, "events")],
)
def test_event_files_go_to_the_folder_named_or_into_the_data(derm, empty, monkeypatch, variable, flag, folder):
    seen = []
    monkeypatch.setattr("derm_pipeline.defs.jobs.RecipeRun.materialise_sources", lambda run: seen.append(run) or ())
    monkeypatch.setattr("derm_pipeline.defs.jobs.RecipeRun.materialise_stages", lambda run: ())
    if variable:
        monkeypatch.setenv("DERM_TENSORBOARD", variable)
    derm("run", "tiny", *(["--tensorboard"] if flag else []), project=empty)
    assert seen[0].workspace.tensorboard == (folder and empty.folder.resolve() / folder)


def test_the_help_teaches(derm):
    text = derm("--help").output
    for command in COMMANDS:
        assert command in text
        told = derm(command, "-h")
        assert told.exit_code == 0
        assert "--data" in told.output
        assert "DERM_RAW" in told.output
        assert len(told.output.splitlines()[2]) > 20, "a command says what it does"
    assert "derm run quickstart" in text
    assert "an interrupted run resumes" in " ".join(derm("run", "-h").output.split())
    assert "quickstart/000123" in derm("lineage", "-h").output


def test_the_version_is_that_of_the_package(derm):
    from derm_pipeline import __version__

    assert __version__ in derm("--version").output


def test_a_misspelt_command_or_option_is_an_error(derm):
    assert derm("rum").exit_code == 2
    assert "--fats" in derm("run", "tiny", "--fats").output


def test_the_sources_say_where_they_are_looked_for(derm, empty):
    text = derm("sources", project=empty).output
    for name, source in SOURCES.items():
        assert f"{name}: {source.title}: not found" in text
        assert str(empty.raw / name) in text
        assert source.licence in text
    assert "derm fetch isic2019 --accept-licence, about 9.1 GB" in text
    assert "from its publisher, https://derm.cs.sfu.ca" in text


def test_a_source_that_is_there_is_counted_and_its_labels_are_explained(derm, finished):
    text = derm("sources", project=finished).output
    assert f"  {NUM_IMAGES} rows: akiec " in text
    text = derm("sources", "isic2019", project=finished).output
    assert "  scc -> scc (squamous cell carcinoma)" in text
    assert "  unk -> none" in text
    assert "Combalia" in text
    assert "ISIC_2019_Training_Input.zip" in text
    assert "'mars' is not a source; there are phantom, ham10000" in derm("sources", "mars", project=finished).output


def test_a_table_that_cannot_be_read_is_said_where_the_sources_are_listed(derm, empty):
    folder = empty.raw / "pad_ufes20"
    folder.mkdir(parents=True)
    (folder / "metadata.csv").write_text("a,b\n1,2\n")
    text = derm("sources", project=empty).output
    assert "pad_ufes20: PAD-UFES-20: found, and cannot be read" in text
    assert "has no column" in text


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(derm, empty):
    folder = empty.raw / "pad_ufes20"
    folder.mkdir(parents=True)
    columns = "patient_id;lesion_id;age;gender;fitspatrick;region;diagnostic;img_id"
    (folder / "metadata.csv").write_text(f"{columns}\nP1;1;44;MALE;3.0;NOSE;WRT;PAT_1_1\n")
    text = derm("sources", "pad_ufes20", project=empty).output
    assert "0 rows; 1 rows or files cannot be used, the first: PAT_1_1, table line 2: diagnostic 'WRT'" in text


def test_fetching_says_where_to_apply_and_asks_for_the_licence_first(derm, empty):
    applied = derm("fetch", "d7p", project=empty)
    assert applied.exit_code == 1
    assert "https://derm.cs.sfu.ca" in applied.output
    asked = derm("fetch", "isic2019", project=empty)
    assert asked.exit_code == 1
    assert "CC BY-NC 4.0" in asked.output
    assert "--accept-licence" in asked.output
    assert "drawn on this machine" in derm("fetch", "phantom", project=empty).output


def test_captions_are_written_beside_the_images_of_one_split_only(derm, finished, tmp_path):
    result = derm("captions", "phantom", str(tmp_path / "out"), "--carrier", ".txt", project=finished)
    assert result.exit_code == 0, result.output
    store = finished.workspace.store
    splits = store.current("splits").table("splits.parquet").to_pylist()
    train = {row["image_id"] for row in splits if row["split"] == "train"}
    texts = {path.stem: path.read_text() for path in (tmp_path / "out").rglob("*.txt")}
    assert set(texts) == train == {path.stem for path in (tmp_path / "out").rglob("*.jpg")}
    rows = store.current("metadata_captions", "phantom").table("captions.parquet").to_pylist()
    assert texts == {row["image_id"]: row["rich"] for row in rows if row["image_id"] in train}
    assert f"{len(train)} captions (rich, train)" in result.output


def test_captions_of_any_style_go_into_one_table_that_others_read(derm, finished, tmp_path):
    from datasets import load_dataset

    arguments = ("captions", "phantom", str(tmp_path / "out"), "--style", "visual", "--split", "test")
    assert derm(*arguments, project=finished).exit_code == 0
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    rows = finished.workspace.store.current("visual_captions", "phantom").table("captions.parquet").to_pylist()
    assert set(loaded["text"]) <= {row["text"] for row in rows}
    assert loaded.num_rows > 0


def test_captions_of_what_is_not_made_yet_say_so(derm, empty, tmp_path):
    result = derm("captions", "phantom", str(tmp_path / "out"), project=empty)
    assert result.exit_code == 1
    assert "records/phantom" in result.output


def test_the_recipes_are_listed_and_printed_with_every_setting(derm, empty):
    import yaml

    text = derm("recipes", project=empty).output
    assert "tiny: Everything, a few steps each (phantom)" in text
    assert "quickstart: " in text
    assert str(empty.data / "recipes") in text
    shown = yaml.safe_load(derm("recipes", "tiny", project=empty).output)
    assert shown["generator"]["width"] == 32
    assert shown["generator"]["condition_dropout"] == 0.1  # a default


def test_an_unknown_recipe_is_named_beside_those_there_are(derm, empty):
    for command in ("run", "recipes"):
        line = the_line(derm(command, "tyni", project=empty))
        assert "'tyni' is not a recipe; there are dit, dit_b, dit_scin, dit_text, dit_xl, ham10000, " in line
    assert "'tiny_fast'" in the_line(derm("run", "tiny", "--fast", project=empty))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: tiny\ngenerator: {wdith: 3}\n", ["own.yaml", "generator.wdith", "allowed here", "width"]),
        ("extends: tiny\ngenerator: {width: wide}\n", ["own.yaml", "generator.width", "integer"]),
        ("extends: tyni\n", ["own.yaml", "'tyni'", "quickstart, skin_diff, tiny"]),
        ("extends: own\n", ["own.yaml", "circle"]),
        ("extends: tiny\nlatents: {size_px: 30}\n", ["own.yaml", "size_px 30"]),
        ("generator: [\n", ["own.yaml", "not YAML", "line"]),
    ],
)
def test_a_wrong_recipe_is_one_line_before_any_work(derm, empty, text, words):
    (empty.data / "recipes" / "own.yaml").write_text(text)
    line = the_line(derm("run", "own", project=empty))
    assert all(word in line for word in words)
    assert not (empty.data / "store").exists()
    assert not empty.raw.exists()


def test_a_missing_source_says_where_it_looked_and_what_it_expects(derm, empty):
    line = the_line(derm("run", "ham10000", project=empty))
    assert str(empty.raw / "ham10000") in line
    assert "HAM10000_metadata.csv" in line
    assert "HAM10000_images_part_1" in line


def test_a_table_without_a_needed_column_is_named_with_the_columns_found(derm, empty):
    folder = empty.raw / "ham10000"
    folder.mkdir(parents=True)
    (folder / "HAM10000_metadata.csv").write_text("lesion_id,image_id,dx_type,age,sex,localization\n")
    line = the_line(derm("run", "ham10000", project=empty))
    assert f"{folder / 'HAM10000_metadata.csv'} has no column 'dx'" in line
    assert "columns found: lesion_id, image_id" in line


def test_what_was_never_made_is_said_to_be_so(derm, empty):
    assert "report/tiny is not a finished artifact" in the_line(derm("report", "tiny", project=empty))
    assert "0 artifacts are called 'nothing'" in the_line(derm("lineage", "nothing", project=empty))
    assert derm("verify", project=empty).output.startswith("0 artifacts")
    assert derm("prune", project=empty).output.startswith("0 directories")


def test_a_folder_that_cannot_be_written_is_named(derm, tmp_path):
    (tmp_path / "file").write_text("")
    result = derm("verify", "--data", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "is a file" in result.output


def test_errors_that_are_not_the_users_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError
    first, second = KeyError("a"), KeyError("b")
    first.__context__, second.__context__ = second, first  # a circle must not hang
    with pytest.raises(KeyError), user_errors():
        raise first


@pytest.mark.slow
def test_lineage_of_a_synthetic_image(derm, finished):
    told = derm("lineage", "tiny/000003", project=finished)
    assert told.exit_code == 0
    for word in (
        "seed: ",
        "prompt: diagnosis=",
        "generator/tiny",
        "autoencoder/tiny",
        "latents/tiny",
        "records/phantom",
    ):
        assert word in told.output
    assert "source files' digest" in told.output
    walk = json.loads(derm("lineage", "tiny/3", "--json", project=finished).output)
    Draft202012Validator(SCHEMA).validate(walk)


@pytest.mark.slow
def test_the_report_is_pointed_at_with_the_figures(derm, finished):
    text = derm("report", "tiny", project=finished).output
    assert "84 samples" in text
    path = next(line.split()[-1] for line in text.splitlines() if line.strip().startswith("report "))
    assert Path(path).is_file()


@pytest.mark.slow
def test_verify_names_a_hand_edited_artifact_and_after_removing_it_the_run_makes_it_again(derm, project):
    artifacts, before = project.artifacts(), project.digests()
    assert derm("verify", project=project).output.startswith(f"{len(artifacts)} artifacts")
    report, captions = artifacts["report"], artifacts["visual_captions"]
    page = report.path("report.html")
    page.write_text(page.read_text().replace("samples", "SAMPLES", 1))
    manifest = json.loads((captions.directory / MANIFEST).read_text())
    (captions.directory / MANIFEST).write_text(json.dumps(manifest | {"code_version": "0"}))
    result = derm("verify", project=project)
    assert result.exit_code == 1
    assert f"{report.reference}: report.html was changed after the artifact was finished" in result.stderr
    assert f"{captions.reference}: manifest.json was changed" in result.stderr
    assert "2 problems" in result.stderr
    for artifact in (report, captions):
        shutil.rmtree(artifact.directory)
    done = run_derm(project, "run", "tiny")
    assert done.returncode == 0, done.stderr
    assert project.digests() == before
    assert derm("verify", project=project).exit_code == 0


@pytest.mark.slow
def test_a_damaged_file_is_one_line_that_says_what_to_do(derm, project):
    generator = project.artifacts()["generator"]
    generator.path("ema.safetensors").write_bytes(b"")
    line = the_line(derm("run", "tiny", project=project))
    assert f"{generator.reference} is damaged (ema.safetensors)" in line
    assert f"remove {generator.directory} and run again" in line


@pytest.mark.slow
def test_prune_removes_what_nothing_current_needs_and_says_so_first(derm, project):
    before = project.digests()
    tiny = project.data / "recipes" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("num_bootstrap: 100", "num_bootstrap: 101"))
    assert run_derm(project, "run", "tiny").returncode == 0
    interrupted = project.data / "store" / "generator" / "tiny" / ".0123456789abcdef.partial"
    interrupted.mkdir()
    assert "generator/tiny/.0123456789abcdef.partial: an interrupted build" in derm("verify", project=project).output
    old = {"group_metrics/tiny", "report/tiny", "leaderboard/all", "generator/tiny"}
    told = derm("prune", "--dry-run", project=project).output.splitlines()
    assert {line.split()[2].rpartition("/")[0] for line in told[:-1]} == old
    assert all(line.startswith("would remove") for line in told[:-1])
    assert told[-1].startswith("4 directories")
    assert interrupted.exists()
    assert derm("prune", project=project).output.splitlines()[-1] == told[-1]
    assert not interrupted.exists()
    assert derm("prune", project=project).output.startswith("0 directories")
    assert derm("verify", project=project).exit_code == 0
    assert {asset for asset, digest in project.digests().items() if digest != before[asset]} <= {
        name.partition("/")[0] for name in old
    }


@pytest.mark.slow
def test_a_failed_check_is_one_line_that_names_it(derm, project, monkeypatch):
    found = ["lesion_id phantom/x is in the training set and held out"]
    monkeypatch.setattr(summary, "leaks", lambda *_: found)
    line = the_line(derm("run", "tiny", project=project))
    assert f"the check nothing_held_out_is_trained_on of training_set failed: {found[0]}" in line


@pytest.mark.slow
def test_a_training_that_diverges_is_one_line(derm, project):
    own = "extends: tiny\ngenerator: {training: {lr: 1.0e+30, clip_norm: 1.0e+30, warmup_steps: 0}}\n"
    (project.data / "recipes" / "own.yaml").write_text(own)
    assert "lower the learning rate" in the_line(derm("run", "own", project=project))


@pytest.mark.slow
def test_an_image_that_changes_under_the_run_is_named(derm, project, monkeypatch):
    """Between the records and the training somebody writes to the source's folder."""
    from derm_pipeline.defs.stages import sets

    image = sorted((project.raw / "phantom" / "images").iterdir())[0]
    shutil.rmtree(project.artifacts()["autoencoder"].directory)
    read = sets.square_reader

    def reader(*arguments):
        for path in image.parent.iterdir():
            path.write_bytes(image.read_bytes() + b" ")
        return read(*arguments)

    monkeypatch.setattr(sets, "square_reader", reader)
    assert "was changed after its record was made" in the_line(derm("run", "tiny", project=project))


@pytest.mark.slow
def test_ctrl_c_ends_without_a_traceback_and_the_work_is_kept(phantoms, tmp_path):
    project = new_project(tmp_path / "project", phantoms)
    (project.data / "recipes" / "long.yaml").write_text("extends: tiny\nautoencoder: {training: {num_steps: 100000}}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "derm_pipeline.cli", "run", "long"],
        env=project.environment(),
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(project.data.glob("store/autoencoder/long/.*.partial/.work/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Aborted!" in output
    assert "Traceback" not in output
    assert len(project.workspace.store.unfinished()) == 1


def can_mount(folder):
    return (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", ["500k", "1700k"])  # in Dagster's database; in a checkpoint
def test_a_full_disk_is_one_line_and_with_more_space_the_same_command_completes(finished, tmp_path, size):
    folder = tmp_path / "small"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("only root may mount a small file system")
    try:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
        project = new_project(folder / "project", finished.raw)
        full = run_derm(project, "run", "tiny")
        assert full.returncode == 1
        assert "Traceback" not in full.stderr
        said = [line for line in full.stderr.splitlines() if line.startswith("derm: ")]
        assert len(said) == 1
        assert "the disk is full" in said[0]
        assert "run the same command again" in said[0]
        made = set(project.data.glob("store/*/*/*/manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)
        assert run_derm(project, "verify").returncode == 0
        done = run_derm(project, "run", "tiny")
        assert done.returncode == 0, done.stderr
        assert set(project.data.glob("store/*/*/*/manifest.json")) > made  # what was finished is found
        assert project.digests() == finished.digests()
        assert project.workspace.store.verify() == []
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_piped_output_is_quiet_and_a_second_run_makes_nothing(project):
    before = {asset: artifact.manifest.finished for asset, artifact in project.artifacts().items()}
    done = run_derm(project, "run", "tiny")
    assert done.returncode == 0
    assert {asset: artifact.manifest.finished for asset, artifact in project.artifacts().items()} == before
    assert "\r" not in done.stderr
    assert len(done.stderr.splitlines()) < 5, done.stderr
    assert done.stdout.splitlines()[0] == "tiny: Everything, a few steps each"
