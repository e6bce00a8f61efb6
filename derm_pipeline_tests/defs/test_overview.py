"""Lineage: from one synthetic image to the source files, for people and for programs."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from derm_pipeline.defs.overview import FORMAT, summary_lines, trace, tree_lines
from derm_pipeline.defs.stages.data import RECORDS
from derm_pipeline.defs.stages.generator import METADATA
from derm_pipeline.store import StoreError

pytestmark = pytest.mark.slow  # they look at a finished run

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "lineage.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def below(node):
    """Every artifact of a walk, by asset."""
    found = {node["asset"]: node}
    for child in node["inputs"].values():
        found |= below(child)
    return found


def test_an_image_is_traced_to_the_files_that_it_came_from(finished):
    artifacts = finished.artifacts()
    walk = trace(finished.workspace, "tiny/41")
    row = artifacts["synthetic_dataset"].table(METADATA).to_pylist()[41]
    image = artifacts["synthetic_dataset"].path(row["file_name"])
    assert walk["image"] == row | {"sha256": hashlib.sha256(image.read_bytes()).hexdigest()}
    assert walk["artifact"]["reference"] == str(artifacts["synthetic_dataset"].reference)
    found = below(walk["artifact"])
    for asset in ("generator", "autoencoder", "latents", "training_set", "records", "splits", "metadata_captions"):
        assert found[asset]["content_digest"] == artifacts[asset].manifest.content_digest
    digests = sorted(artifacts["records"].table(RECORDS)["sha256"].to_pylist())
    files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (finished.raw / "phantom/images").iterdir()]
    assert sorted(files) == digests
    of_files = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert found["records"]["counts"]["source_files_digest"] == of_files
    assert found["raw_images"]["inputs"] == {}
    # the held-out images had no part in it
    assert not {"evaluation_set", "classifiers"} & set(found)


def test_the_tree_names_all_of_it(finished):
    walk = trace(finished.workspace, "tiny/000000")
    text = "\n".join(tree_lines(walk))
    for word in ("sample_id", "prompt", "seed", "generator_digest"):
        assert str(walk["image"][word]) in text
    for artifact in below(walk["artifact"]).values():
        assert artifact["reference"] in text
        assert artifact["content_digest"][:16] in text
    assert f"source files' digest {below(walk['artifact'])['records']['counts']['source_files_digest'][:16]}" in text
    # what has several children is unfolded once
    lines = text.splitlines()
    repeated = [line for line in lines if "records/phantom" in line and "source files" in line]
    assert len([line for line in repeated if "(above)" not in line]) == 1
    assert len([line for line in lines if "raw_images/phantom" in line]) == 1


def test_an_image_is_found_by_number_by_id_and_by_file(finished):
    path = finished.artifacts()["synthetic_dataset"].path("images/000007.png")
    walks = [trace(finished.workspace, name) for name in ("tiny/7", "tiny/000007", str(path))]
    assert walks[0] == walks[1] == walks[2]
    assert walks[0]["image"]["sample_id"] == "tiny/000007"


@pytest.mark.parametrize("name", ["tiny/7", "report/tiny", "records/phantom", "splits", "leaderboard"])
def test_every_walk_is_as_the_schema_says(finished, name):
    Draft202012Validator.check_schema(SCHEMA)
    walk = json.loads(json.dumps(trace(finished.workspace, name)))
    VALIDATOR.validate(walk)
    assert (walk["image"] is None) == (name != "tiny/7")
    assert SCHEMA["properties"]["format"]["const"] == walk["format"] == FORMAT


def test_the_schema_refuses_what_is_not_a_walk(finished):
    walk = trace(finished.workspace, "tiny/7")

    def is_valid(change):
        changed = copy.deepcopy(walk)
        change(changed)
        return VALIDATOR.is_valid(changed)

    assert is_valid(lambda walk: None)
    assert not is_valid(lambda walk: walk.update(format="derm_pipeline/lineage/2"))
    assert not is_valid(lambda walk: walk.update(more=1))
    assert not is_valid(lambda walk: walk["image"].pop("seed"))
    assert not is_valid(lambda walk: walk["image"].update(sha256="abc"))
    assert not is_valid(lambda walk: walk["artifact"]["inputs"]["generator"].pop("content_digest"))
    assert not is_valid(lambda walk: walk["artifact"]["inputs"]["generator"].pop("settings"))
    assert not is_valid(lambda walk: walk.pop("artifact"))


def test_what_is_not_there_is_named(finished, tmp_path):
    for name, message in (
        ("tiny/84", "no image tiny/000084; it has 84"),
        ("nothing", "0 artifacts are called 'nothing'"),
        ("generator/quickstart", "generator/quickstart is not a finished artifact"),
        ("a/b/c/d", "0 artifacts"),
    ):
        with pytest.raises(StoreError, match=message):
            trace(finished.workspace, name)


def test_an_image_that_left_its_folder_is_known_by_what_it_carries(finished, tmp_path):
    path = finished.artifacts()["synthetic_dataset"].path("images/000007.png")
    shutil.copy(path, tmp_path / "holiday.png")
    assert trace(finished.workspace, str(tmp_path / "holiday.png")) == trace(finished.workspace, "tiny/7")
    (tmp_path / "other.png").write_bytes(b"no image")
    with pytest.raises(StoreError, match=r"other\.png is no image of this pipeline"):
        trace(finished.workspace, str(tmp_path / "other.png"))


def test_the_summary_gives_every_figure_with_its_n(finished):
    lines = summary_lines(finished.workspace, "tiny")
    text = "\n".join(lines)
    counts = {asset: artifact.counts for asset, artifact in finished.artifacts().items()}
    assert f"{counts['training_set']['num_images']} train" in text
    assert f"{counts['classifiers']['agreement']['all']:.3f} of 84 samples" in text
    for arm, figure in counts["group_metrics"]["balanced_accuracy"].items():
        line = next(line for line in lines if "balanced accuracy" in line and f" {arm} " in line)
        assert f"{figure['value']:.3f}" in line
        assert f"n {figure['n']}" in line
    assert "copies     no verdict" in text  # too few held-out images, and that is said
    assert any(Path(line.split()[-1]).is_file() for line in lines if "report" in line)
