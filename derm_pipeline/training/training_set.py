"""The training set: the rows, captions and classes that a recipe's generator may see, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from derm_pipeline.records import Diagnosis, Split


class TrainingSetConfig(BaseModel):
    """The training_set stage of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    caption: Literal["metadata", "visual"] = "metadata"
    """Which caption goes with an image."""
    remove_hair: bool = False
    """Whether hair is painted over before an image is encoded or classified."""


def split_rows(records: pa.Table, splits: pa.Table, split: Split) -> pa.Table:
    """The rows of `records` (of any sources) that `splits` puts into one split, each image once.

    A second record of the same bytes adds nothing but weight, so duplicates of an earlier row are left out.
    """
    split_of = dict(zip(_identities(splits), splits["split"].to_pylist(), strict=True))
    wanted = [split_of.get(identity) == split.value for identity in _identities(records)]
    rows = records.filter(pa.array(wanted, pa.bool_()))
    rows = rows.filter(pc.is_null(rows["duplicate_of"]))
    return rows.sort_by([("source", "ascending"), ("image_id", "ascending")])


def _identities(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["source"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def select_training_set(records: pa.Table, splits: pa.Table, captions: pa.Table) -> pa.Table:
    """The train split's records with their captions (column `text`), ordered by source and image_id.

    Args:
        records: rows of the recipe's sources.
        splits: the assignment of every group.
        captions: columns source, image_id and text.

    Raises:
        ValueError: an image without a caption, or no image at all.
    """
    rows = split_rows(records, splits, Split.TRAIN)
    if rows.num_rows == 0:
        raise ValueError("no record of this recipe's sources is in the train split: materialise records and splits")
    known = dict(zip(_identities(captions), captions["text"].to_pylist(), strict=True))
    missing = [identity for identity in _identities(rows) if identity not in known]
    if missing:
        first = "/".join(missing[0])
        raise ValueError(f"{len(missing)} images have no caption (first: {first}): materialise the captions again")
    return rows.append_column("text", pa.array([known[identity] for identity in _identities(rows)], pa.string()))


def training_set_problems(training_set: pa.Table, splits: pa.Table) -> list[str]:
    """Sentences naming every lesion, patient or duplicate that is both in the training set and held out."""
    problems = []
    others = splits.filter(pc.is_in(splits["split"], pa.array([Split.VAL.value, Split.TEST.value])))
    for column in ("lesion_id", "patient_id", "sha256"):
        by_source = ("source", column) if column != "sha256" else (column,)
        held_out = set(zip(*(others[name].to_pylist() for name in by_source), strict=True))
        seen = set(zip(*(training_set[name].to_pylist() for name in by_source), strict=True))
        shared = sorted(key for key in held_out & seen if key[-1] is not None)
        problems += [f"{column} {'/'.join(map(str, key))} is in the training set and held out" for key in shared]
    return problems


def diagnosis_counts(table: pa.Table) -> dict[str, int]:
    """Rows of each diagnosis, in the canonical order."""
    counts = Counter(table["diagnosis"].to_pylist())
    return {diagnosis.value: counts[diagnosis.value] for diagnosis in Diagnosis}
