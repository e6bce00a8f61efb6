"""The stages of a source, over real files: one's own sources, captioners of every kind, several sources at once."""

import shutil

import pytest

from derm_pipeline.captions.llava_next import LlavaNextCaptioner
from derm_pipeline.captions.tiny import write_tiny_llava_next
from derm_pipeline.defs.stages import data as stages
from derm_pipeline.defs.stages.exporting import export_captions
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.sources.phantom import PhantomSource
from derm_pipeline.sources.phantom.drawing import PhantomConfig
from derm_pipeline.splits import split_problems
from derm_pipeline.store import StoreError

NUM = 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "phantom"
    PhantomSource(PhantomConfig(num_images=NUM, width_px=64, height_px=48, seed=3)).prepare(folder)
    return folder


@pytest.fixture
def workspace(tmp_path, drawn):
    shutil.copytree(drawn, tmp_path / "raw" / "phantom")
    (tmp_path / "data").mkdir()
    return Workspace(tmp_path / "data", tmp_path / "raw")


def prepared(workspace, source="phantom"):
    for stage in (stages.records, stages.hair, stages.descriptors):
        stage(workspace, source)
    return workspace


def with_captioner(workspace, settings):
    """The same folders, read anew with these settings of the captioner."""
    (workspace.data / "captioner.yaml").write_text(settings)
    return Workspace(workspace.data, workspace.raw)


@pytest.fixture
def asked(monkeypatch):
    """How many images each call of the model was about."""
    sizes = []
    answer = LlavaNextCaptioner.answer
    monkeypatch.setattr(
        LlavaNextCaptioner, "answer", lambda self, given: sizes.append(len(given)) or answer(self, given)
    )
    return sizes


def tiny_settings(tmp_path, **more):
    folder = write_tiny_llava_next(tmp_path / "tiny")
    settings = {"kind": "llava_next", "model": folder, "max_new_tokens": 6, "max_attempts": 1, "batch_size": 4} | more
    return "".join(f"{key}: {value}\n" for key, value in settings.items())


def test_a_model_captions_every_image_in_batches_and_a_second_run_asks_nothing(workspace, tmp_path, asked):
    workspace = with_captioner(prepared(workspace), tiny_settings(tmp_path))
    found = stages.visual_captions(workspace, "phantom")
    assert asked == [4, 4, 4]
    rows = found.table(stages.CAPTIONS).to_pylist()
    records = workspace.store.current("records", "phantom").table(stages.RECORDS)
    assert [row["image_id"] for row in rows] == records["image_id"].to_pylist()
    assert {row["captioner"] for row in rows} == {"llava_next"}
    assert {row["verdict"] for row in rows} == {"fallback"}  # a random model says nothing of use
    assert all(row["raw_answer"] and row["gate_reasons"] for row in rows)
    assert found.counts["verdicts"] == {"fallback": NUM}
    stages.visual_captions(workspace, "phantom")
    assert sum(asked) == NUM


def test_how_the_work_is_done_makes_no_new_captions(workspace, tmp_path, asked):
    workspace = with_captioner(prepared(workspace), tiny_settings(tmp_path))
    first = stages.visual_captions(workspace, "phantom")
    again = stages.visual_captions(with_captioner(workspace, tiny_settings(tmp_path, batch_size=3)), "phantom")
    assert again.reference == first.reference
    assert sum(asked) == NUM


def test_only_new_images_are_asked_about(workspace, tmp_path, asked):
    table = workspace.raw / "phantom" / "metadata.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-3]))
    workspace = with_captioner(prepared(workspace), tiny_settings(tmp_path))
    stages.visual_captions(workspace, "phantom")
    assert sum(asked) == NUM - 3
    table.write_text("".join(lines))
    stages.visual_captions(prepared(workspace), "phantom")
    assert sum(asked) == NUM


def test_an_interrupted_captioning_loses_one_batch(workspace, tmp_path, asked, monkeypatch):
    workspace = with_captioner(prepared(workspace), tiny_settings(tmp_path))
    answer = LlavaNextCaptioner.answer

    def stop(self, given):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(LlavaNextCaptioner, "answer", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.visual_captions(workspace, "phantom")
    assert asked == [4, 4]
    stages.visual_captions(workspace, "phantom")
    assert asked == [4, 4, 4]


def test_a_captioner_that_was_used_before_is_not_asked_again(workspace, tmp_path, asked):
    first = with_captioner(prepared(workspace), tiny_settings(tmp_path))
    stages.visual_captions(first, "phantom")
    stages.visual_captions(with_captioner(workspace, "kind: descriptor\n"), "phantom")
    table = workspace.raw / "phantom" / "metadata.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-2]))
    again = with_captioner(prepared(workspace), tiny_settings(tmp_path))
    assert stages.visual_captions(again, "phantom").table(stages.CAPTIONS).num_rows == NUM - 2
    assert sum(asked) == NUM


def test_a_models_folder_is_looked_for_beside_the_settings(workspace):
    write_tiny_llava_next(workspace.data / "models" / "tiny")
    assert with_captioner(workspace, "kind: llava_next\nmodel: models/tiny\n").captioner.model == str(
        workspace.data / "models" / "tiny"
    )
    hub = "llava-hf/llama3-llava-next-8b-hf"
    assert with_captioner(workspace, f"kind: llava_next\nmodel: {hub}\n").captioner.model == hub


def test_where_a_model_is_refused_the_descriptors_sentence_stands(workspace, tmp_path):
    described = stages.visual_captions(prepared(workspace), "phantom").table(stages.CAPTIONS)["text"].to_pylist()
    workspace = with_captioner(workspace, tiny_settings(tmp_path))
    assert stages.visual_captions(workspace, "phantom").table(stages.CAPTIONS)["text"].to_pylist() == described


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("kind: llava\n", ["captioner.yaml", "'llava_next'", "'openai'"]),
        ("kind: llava_next\nbeams: 3\n", ["captioner.yaml: llava_next.beams"]),
        ("kind: openai\nmodel: m\n", ["captioner.yaml: openai.base_url: Field required"]),
        ("kind: [\n", ["captioner.yaml: not YAML"]),
        ("", ["captioner.yaml"]),
    ],
)
def test_wrong_settings_of_the_captioner_name_the_file_and_the_key(workspace, settings, words):
    with pytest.raises(ValueError, match=r"captioner\.yaml") as caught:
        _ = with_captioner(workspace, settings).captioner
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_servers_key_comes_from_the_environment_and_is_stored_nowhere(workspace, monkeypatch):
    settings = "kind: openai\nbase_url: http://127.0.0.1:9/v1\nmodel: m\napi_key_env: MY_KEY\n"
    workspace = with_captioner(workspace, settings)
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment variable MY_KEY is not set"):
        workspace.api_key(workspace.captioner)
    monkeypatch.setenv("MY_KEY", "secret words")
    assert workspace.api_key(workspace.captioner) == "secret words"
    assert "MY_KEY" not in str(workspace.captioner.identity())


@pytest.fixture
def own(workspace, drawn):
    """The drawn images once more as a source of one's own: the same bytes under other names."""
    folder = workspace.raw / "moles"
    for diagnosis in ("nevus", "unheard of"):
        (folder / diagnosis).mkdir(parents=True)
    for place, file in enumerate(sorted((drawn / "images").iterdir())):
        shutil.copyfile(file, folder / ("nevus" if place % 2 else "unheard of") / f"m{place}.jpg")
    (workspace.data / "sources.yaml").write_text(
        "moles:\n  kind: imagefolder\n  title: My moles\n  licence: CC0\n  modality: clinical\n"
        "  diagnoses: {nevus: nv, unheard of: null}\n"
    )
    return Workspace(workspace.data, workspace.raw)


def test_a_source_of_ones_own_goes_through_every_stage(own):
    prepared(own, "moles")
    visual = stages.visual_captions(own, "moles").table(stages.CAPTIONS)["text"].to_pylist()
    assert all(text.startswith("clinical image of") for text in visual)
    captions = stages.metadata_captions(own, "moles").table(stages.CAPTIONS)
    assert set(captions["rich"].to_pylist()) == {
        text for text in captions["rich"].to_pylist() if text.startswith("clinical photograph of")
    }
    artifact = own.store.current("records", "moles")
    assert artifact.counts["num_without_diagnosis"] == NUM // 2
    labels = {row["source_label"]: row["diagnosis"] for row in artifact.table(stages.LABELS).to_pylist()}
    assert labels == {"nevus": "nv", "unheard of": None}


def test_the_same_images_in_two_sources_are_on_the_same_side(own):
    for source in ("phantom", "moles"):
        stages.records(own, source)
    artifact = stages.splits(own)
    table = artifact.table(stages.SPLITS)
    assert split_problems(table) == []
    sides = {}
    for row in table.to_pylist():
        sides.setdefault(row["sha256"], set()).add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    assert artifact.counts["joined"]["digest"]["num_images_across"] == 2 * NUM


def test_who_has_a_side_keeps_it_when_a_source_is_added(own):
    stages.records(own, "phantom")
    before = {row["image_id"]: row["split"] for row in stages.splits(own).table(stages.SPLITS).to_pylist()}
    stages.records(own, "moles")
    after = stages.splits(own)
    rows = after.table(stages.SPLITS).to_pylist()
    assert {row["image_id"]: row["split"] for row in rows if row["source"] == "phantom"} == before
    assert after.counts["grown_from"].startswith("splits")


def assigned(workspace):
    rows = stages.splits(workspace).table(stages.SPLITS).to_pylist()
    return {(row["source"], row["image_id"]): row["split"] for row in rows}


def test_who_leaves_and_comes_back_finds_his_split_again(own):
    for source in ("phantom", "moles"):
        stages.records(own, source)
    before = assigned(own)
    table = own.raw / "phantom" / "metadata.csv"
    lines = table.read_text().splitlines(keepends=True)
    for away in (True, False):
        table.write_text("".join(lines[:3] if away else lines))
        folder = own.raw / "moles" / "nevus"
        if away:
            folder.rename(own.data / "elsewhere")
        else:
            (own.data / "elsewhere").rename(folder)
        for source in ("phantom", "moles"):
            stages.records(own, source)
        now = assigned(own)
        assert len(now) < len(before) or not away
        assert now.items() <= before.items()
    assert now == before


def test_captions_of_other_records_are_refused_not_mixed_up(workspace):
    prepared(workspace)
    stages.visual_captions(workspace, "phantom")
    stages.metadata_captions(workspace, "phantom")
    stages.splits(workspace)
    table = workspace.raw / "phantom" / "metadata.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([lines[0], lines[2].replace(",nv,", ",mel,"), *lines[3:]]))
    stages.records(workspace, "phantom")
    for use in (
        lambda: stages.descriptors(workspace, "phantom"),
        lambda: stages.metadata_captions(workspace, "phantom"),
        lambda: exported(workspace, workspace.data / "out"),
    ):
        with pytest.raises(StoreError, match="made from other records than the current ones: materialise it again"):
            use()


def exported(workspace, out):
    return export_captions(
        workspace, "phantom", out, style="rich", carrier="metadata.csv", split="all", with_images=True
    )


def test_captions_are_never_written_over_the_sources_own_files(workspace):
    prepared(workspace)
    stages.visual_captions(workspace, "phantom")
    stages.metadata_captions(workspace, "phantom")
    for out in (
        workspace.raw / "phantom",
        workspace.raw / "phantom" / "images" / "..",
        workspace.raw / "phantom" / "x",
    ):
        with pytest.raises(ValueError, match="is in the folder of phantom itself"):
            exported(workspace, out)
    exported(workspace, workspace.data / "out")
    one = next((workspace.data / "out").rglob("*.jpg"))
    assert one.stat().st_nlink == 1  # a copy: what another program does to it leaves the source alone
