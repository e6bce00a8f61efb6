"""Rows that are learnt from, watched and judged: of the same diagnoses."""

import pyarrow as pa
import pytest

from derm_pipeline.defs.stages.data import RECORDS, SPLITS
from derm_pipeline.defs.stages.sets import (
    EVALUATION_SET,
    VALIDATION_SET,
    evaluation_set,
    rows_of,
    validation_set,
)
from derm_pipeline.records import Split
from derm_pipeline.store import Request
from derm_pipeline_tests.conftest import new_project

TRAIN, VAL, TEST = {"nv": 9, "mel": 4, "df": 2}, {"nv": 2, "mel": 1, "df": 3}, {"nv": 1, "mel": 1, "df": 1}


@pytest.fixture
def workspace(tmp_path):
    """A project with records and splits, in which few images are of rare diagnoses."""
    project = new_project(tmp_path / "project")
    rows = [
        {"image_id": f"{split}_{name}_{number}", "diagnosis": name, "split": split.value}
        for split, counts in zip((Split.TRAIN, Split.VAL, Split.TEST), (TRAIN, VAL, TEST), strict=True)
        for name, num in counts.items()
        for number in range(num)
    ]
    rows = [row | {"source": "phantom", "sha256": f"{place:064x}"} for place, row in enumerate(rows)]
    empty = pa.array([None] * len(rows), pa.string())
    table = pa.Table.from_pylist(rows).append_column("duplicate_of", empty)
    store = project.workspace.store
    records, splits = Request("records", "phantom", {}, {}, "1"), Request("splits", "all", {}, {}, "1")
    store.obtain(records, lambda build: build.write_table(RECORDS, table.drop_columns(["split"])))
    store.obtain(splits, lambda build: build.write_table(SPLITS, table))
    return project.workspace


@pytest.mark.parametrize(
    ("settings", "learnt"),
    [
        ("{}", {"nv", "mel", "df"}),
        ("{min_images: 4}", {"nv", "mel"}),  # of which val and test have fewer than four each
        ("{min_images: 4, diagnoses: [mel, df]}", {"mel"}),
        ("{diagnoses: [nv, df]}", {"nv", "df"}),
    ],
)
def test_what_is_too_rare_to_be_learnt_is_not_judged_and_what_is_learnt_is_however_few_images_judge_it(
    settings, learnt, workspace
):
    (workspace.data / "recipes" / "own.yaml").write_text(f"extends: tiny\ntraining_set: {settings}\n")
    train = rows_of(workspace, workspace.recipe("own"), Split.TRAIN)
    assert train.rows.num_rows == sum(TRAIN[name] for name in learnt)
    judged = evaluation_set(workspace, "own").table(EVALUATION_SET)
    assert judged.num_rows == sum(VAL[name] + TEST[name] for name in learnt)
    watched = validation_set(workspace, "own").table(VALIDATION_SET)
    assert watched.num_rows == sum(VAL[name] for name in learnt)
    for rows in (train.rows, judged, watched):
        assert set(rows["diagnosis"].to_pylist()) == learnt
