"""Lineage of what derm generate drew: from an image, wherever it went, to the generator that drew it."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from PIL import Image

from derm_pipeline.cli import main
from derm_pipeline.defs.overview import trace, tree_lines
from derm_pipeline.store import StoreError
from derm_pipeline_tests.conftest import new_project
from derm_pipeline_tests.generation.networks import generator_at, with_networks

VALIDATOR = Draft202012Validator(json.loads((Path(__file__).parents[2] / "docs" / "lineage.schema.json").read_text()))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return with_networks(new_project(folder / "project"), generator_at(folder / "networks"))


@pytest.fixture(scope="module")
def drawn(project):
    """A folder of five samples in a format, drawn once."""

    def draw(output):
        told = ["--recipe", "tiny", "--diagnosis", "mel", "--skin-type", "2", "--count", "5", "--format", output]
        result = CliRunner().invoke(main, ["generate", *told, "--data", str(project.data), "--raw", str(project.raw)])
        assert result.exit_code == 0, result.output
        return Path(result.stdout.strip().rpartition(": ")[2])

    return draw


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("output", "suffix"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_an_image_leads_to_its_generator_by_file_by_id_and_as_a_copy(project, drawn, tmp_path, output, suffix):
    folder = drawn(output)
    path = folder / "images" / f"000003.{suffix}"
    walk = trace(project.workspace, str(path))
    VALIDATOR.validate(json.loads(json.dumps(walk)))
    row = pq.read_table(folder / "metadata.parquet").to_pylist()[3]
    assert walk["image"] == row | {"sha256": sha256(path.read_bytes())}
    generator = project.workspace.store.current("generator", "tiny")
    assert walk["artifact"]["reference"] == str(generator.reference)
    assert walk["artifact"]["inputs"]["latents"]["inputs"]["autoencoder"]["asset"] == "autoencoder"
    copied = shutil.copy(path, tmp_path / f"holiday.{suffix}")
    for name in (f"tiny/{folder.name}/000003", f"tiny/{folder.name}/3", str(copied)):
        assert trace(project.workspace, name) == walk
    assert str(generator.reference) in "\n".join(tree_lines(walk))


def test_a_sample_within_a_file_is_found_by_its_number_and_the_file_leads_to_the_generator(project, drawn):
    generator = str(project.workspace.store.current("generator", "tiny").reference)
    for output, name in (("npz", "samples.npz"), ("grid", "samples.png"), ("parquet", "samples-00000.parquet")):
        folder = drawn(output)
        whole = trace(project.workspace, str(folder / name))
        assert whole["image"] is None
        assert whole["artifact"]["reference"] == generator
        one = trace(project.workspace, f"tiny/{folder.name}/4")
        VALIDATOR.validate(json.loads(json.dumps(one)))
        assert one["image"]["sample_id"] == f"tiny/{folder.name}/000004"
        if output != "parquet":
            assert one == trace(project.workspace, f"{folder / name}#4")
    rows = pq.read_table(folder / name).to_pylist()
    assert one["image"]["sha256"] == sha256(rows[4]["image"]["bytes"])


def test_what_was_changed_or_is_gone_is_not_taken_for_it(project, drawn, tmp_path):
    def refused(name, words):
        with pytest.raises(StoreError, match=words):
            trace(project.workspace, str(name))

    folder = Path(shutil.copytree(drawn("png"), tmp_path / "elsewhere"))
    image = folder / "images" / "000001.png"
    refused(f"tiny/{drawn('png').name}/5", "has no image .*000005; it has 5")
    refused(f"tiny/{'0' * 12}/1", "0 artifacts are called")
    shutil.copy(folder / "images" / "000002.png", image)
    refused(image, "is not the sample .*000001 any more")
    changed = tmp_path / "changed.png"
    changed.write_bytes((folder / "images" / "000002.png").read_bytes() + b"0")
    refused(changed, "but it was changed")
    shutil.rmtree(folder / "images")
    refused(f"tiny/{drawn('png').name}/9", "has no image")
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    (tmp_path / "other.png").write_bytes(content.getvalue())
    refused(tmp_path / "other.png", "is no image of this pipeline's store")


def test_a_copy_whose_folder_is_gone_names_its_generator(project, drawn, tmp_path):
    folder = drawn("webp")
    copied = shutil.copy(folder / "images" / "000000.webp", tmp_path / "kept.webp")
    shutil.rmtree(folder)
    reference = project.workspace.store.current("generator", "tiny").reference
    with pytest.raises(StoreError, match=f"the sample tiny/{folder.name}/000000 of {reference}, but the folder"):
        trace(project.workspace, str(copied))


def test_metadata_that_leaves_its_folder_or_names_no_generator_is_refused(project, drawn):
    folder = drawn("jpeg")
    shutil.copy(folder / "images" / "000000.jpg", folder.parent / "secret.jpg")
    table = pq.read_table(folder / "metadata.parquet")
    for column, value, words in (
        ("file_name", "images/../../secret.jpg", "which is not in its folder"),
        ("generator_digest", "0" * 64, "is not in "),
    ):
        changed = table.set_column(table.column_names.index(column), column, [[value] * table.num_rows])
        pq.write_table(changed, folder / "metadata.parquet")
        with pytest.raises(StoreError, match=words):
            trace(project.workspace, f"tiny/{folder.name}/0")
    shutil.rmtree(folder)
