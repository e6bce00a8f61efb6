"""The training set: the rows, captions and classes that a recipe's generator may see, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.captions.metadata import CaptionStyle
from derm_pipeline.records import Diagnosis, Split, canonical
from derm_pipeline.sources.identity import archive_names


class TrainingSetConfig(BaseModel):
    """The training_set stage of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Literal["groups", "light_dark"] = "groups"
    """groups: that of all sources, whole groups at a time; light_dark: learn from light skin, test on dark."""
    diagnoses: tuple[Diagnosis, ...] = ()
    """What is learnt and judged; where none is named, every diagnosis that the training images have."""
    min_images: int = Field(default=1, ge=1)
    """Images of a diagnosis in the train split, doubles not counted, from which on it is learnt and judged; rarer ones
    are left out, by name in the counts."""
    caption: Literal[CaptionStyle, "visual"] = "rich"
    """Which caption goes with an image: a style of the metadata captions, or the visual one."""
    remove_hair: bool = False
    """Whether hair is painted over before an image is encoded or classified."""


@dataclass(frozen=True)
class Selection:
    """The images of one split that a recipe uses."""

    rows: pa.Table
    """Ordered by source and image_id."""
    left_out: Mapping[str, int]
    """Images of the split that are not used, by the reason."""
    joined: Mapping[str, int]
    """Images left out as another image's double, by what they share (archive_id, digest); and of these the number
    whose diagnosis is not that of the image that is used (other_diagnosis)."""
    rare: Mapping[str, int] = field(default_factory=dict)
    """Images of each diagnosis that has too few of them."""


def select_rows(
    records: pa.Table, splits: pa.Table, split: Split, config: TrainingSetConfig | None = None
) -> Selection:
    """The rows of `records` that `splits` puts into one split, each image once, with a diagnosis that is learnt.

    A second picture of the same bytes, or of the same name in a shared archive, adds nothing but weight: the first in
    the order of `records` (so, of the recipe's sources) is used.
    """
    config = config or TrainingSetConfig()
    split_of = dict(zip(_identities(splits), splits["split"].to_pylist(), strict=True))
    rows = records.filter(pa.array([split_of.get(key) == split.value for key in _identities(records)], pa.bool_()))
    diagnoses = rows["diagnosis"].combine_chunks()
    wanted = pa.array([diagnosis.value for diagnosis in config.diagnoses or Diagnosis])
    is_wanted = pc.is_in(diagnoses, value_set=wanted)
    num_unknown, num_rows = diagnoses.null_count, rows.num_rows
    rows = rows.filter(is_wanted)
    is_double, joined = _doubles(rows)
    left_out = {
        "no diagnosis": num_unknown,
        "another diagnosis": num_rows - num_unknown - rows.num_rows,
        "double": int(is_double.sum()),
    }
    rows = rows.filter(pa.array(~is_double)).sort_by([("source", "ascending"), ("image_id", "ascending")])
    rare = {name: count for name, count in diagnosis_counts(rows).items() if count < config.min_images}
    if rare:
        left_out["rare diagnosis"] = sum(rare.values())
        rows = rows.filter(pc.invert(pc.is_in(rows["diagnosis"], value_set=pa.array(list(rare)))))
    return Selection(rows, left_out, joined, rare)


def _doubles(rows: pa.Table) -> tuple[np.ndarray, dict[str, int]]:
    """Which rows show an image that an earlier row shows (n,), and how they are known."""
    names, digests = archive_names(rows["image_id"]).to_pylist(), rows["sha256"].to_pylist()
    diagnoses, duplicate_of = rows["diagnosis"].to_pylist(), rows["duplicate_of"].to_pylist()
    first: dict[str, int] = {}
    is_double = np.zeros(rows.num_rows, bool)
    joined = {"archive_id": 0, "digest": 0, "other_diagnosis": 0}
    for row, (name, digest) in enumerate(zip(names, digests, strict=True)):
        same_name, same_bytes = first.get(f"name {name}"), first.get(f"digest {digest}")
        earlier = same_name if same_name is not None else same_bytes
        if earlier is not None or duplicate_of[row] is not None:
            is_double[row] = True
            joined["archive_id"] += same_name is not None
            joined["digest"] += same_bytes is not None or duplicate_of[row] is not None
            joined["other_diagnosis"] += earlier is not None and diagnoses[earlier] != diagnoses[row]
        place = row if earlier is None else earlier
        if name is not None:
            first.setdefault(f"name {name}", place)
        first.setdefault(f"digest {digest}", place)
    return is_double, joined


def _identities(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["source"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def with_captions(rows: pa.Table, captions: pa.Table) -> pa.Table:
    """The rows with their captions (column `text`, in the place of the source's own).

    Args:
        rows: the images.
        captions: columns source, image_id and text.

    Raises:
        ValueError: an image without a caption, or no image at all.
    """
    if rows.num_rows == 0:
        raise ValueError(
            "no image of this recipe's sources with a diagnosis that it learns is in the train split: look at records "
            "and splits"
        )
    known = dict(zip(_identities(captions), captions["text"].to_pylist(), strict=True))
    missing = [identity for identity in _identities(rows) if identity not in known]
    if missing:
        first = "/".join(missing[0])
        raise ValueError(f"{len(missing)} images have no caption (first: {first}): materialise the captions again")
    texts = pa.array([known[identity] for identity in _identities(rows)], pa.string())
    return rows.set_column(rows.column_names.index("text"), "text", texts)


def training_set_problems(training_set: pa.Table, splits: pa.Table) -> list[str]:
    """Sentences naming every lesion, patient, duplicate or archive image both in the training set and held out."""
    problems = []
    held_out = splits.filter(pc.is_in(splits["split"], pa.array([Split.VAL.value, Split.TEST.value])))
    for column in ("lesion_id", "patient_id", "sha256", "image_id"):
        shared = sorted(_keys(held_out, column) & _keys(training_set, column))
        problems += [f"{column} {key} is in the training set and held out" for key in shared]
    return problems


def _keys(table: pa.Table, column: str) -> set[str]:
    """What must not be on two sides: ids within their source, digests and an archive's names everywhere."""
    values = table[column].to_pylist()
    if column == "sha256":
        return set(values)
    named = archive_names(table[column]).to_pylist()
    keys = zip(table["source"].to_pylist(), values, named, strict=True)
    return {name or f"{source}/{value}" for source, value, name in keys if value is not None}


def diagnosis_counts(table: pa.Table) -> dict[str, int]:
    """Rows of each diagnosis that occurs, in the canonical order."""
    counts = Counter(table["diagnosis"].to_pylist())
    return {diagnosis.value: counts[diagnosis.value] for diagnosis in canonical(counts)}
