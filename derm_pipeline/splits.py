"""Which side every image is on: train, val or test, decided once and for whole groups.

Images that could give each other away (one lesion, one patient, the same bytes, the same id of a shared archive) form a
group, and a group is on one side. Who was assigned before stays; only new groups are placed, so that adding data moves
nobody. Nothing here reads a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from derm_pipeline.records import Split
from derm_pipeline.sources.identity import shared_names

Ints = npt.NDArray[np.int64]

SPLIT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("lesion_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("withheld_reason", pa.string()),
    ]
)
"""Column names and types of the `splits` table. `split` is null exactly where `withheld_reason` is not."""

_BY_STRICTNESS = (Split.TRAIN, Split.VAL, Split.TEST)
_NONE = -1
_IDENTITY = ["source", "image_id", "sha256", "lesion_id", "patient_id"]


class SplitConfig(BaseModel):
    """How images are shared out; a change moves nobody who was assigned before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_fraction: float = Field(default=0.65, gt=0, le=1)
    """Share of the images that generators and classifiers learn from."""
    val_fraction: float = Field(default=0.10, ge=0, lt=1)
    """Share of the images that choices during training are made on."""
    test_fraction: float = Field(default=0.25, ge=0, lt=1)
    """Share of the images that figures are computed on."""
    seed: int = Field(default=0, ge=0)
    """Decides the order in which new groups are placed."""
    stratify_by: tuple[Literal["diagnosis", "skin_tone", "sex", "site"], ...] = ("diagnosis", "skin_tone")
    """What the shares hold for within each source, the first named before the next."""

    @model_validator(mode="after")
    def _fractions_sum_to_one(self) -> Self:
        total = sum(self.by_strictness)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train_fraction, val_fraction and test_fraction sum to {total:g}; they must sum to 1")
        return self

    @property
    def by_strictness(self) -> tuple[float, float, float]:
        """The shares of train, val and test."""
        return self.train_fraction, self.val_fraction, self.test_fraction


def assign_splits(records: pa.Table, previous: pa.Table | None, config: SplitConfig) -> pa.Table:
    """Put every image on one side, whole groups at a time.

    Groups are the connected components over lesion and patient (within a source), digest and shared archive names
    (across sources). A group keeps the side it had in `previous`, also where the images that had it are gone by now.
    The side that a publisher put an image on holds for its group, the strictest where there are several.
    New groups follow in an order drawn from the seed. Each goes where the squared deviations from the shares grow
    least, summed over the strata that its images are in: the source, the source's diagnosis, and so on.

    Where new images join groups of different sides, nobody moves: the strictest side (test, then val) is that of the
    new images too, and the images on the looser sides are withheld from every side, for good.

    Args:
        records: rows of all sources, with the columns of `RECORD_SCHEMA` that are named here.
        previous: the table of the last assignment, or None.
        config: shares, seed and strata.

    Returns:
        One row an image with `SPLIT_SCHEMA`, ordered by source and image_id; it does not depend on the order of rows.

    Raises:
        ValueError: an image occurs twice, or a column is missing.
    """
    _check_columns(records, "the records", [*_IDENTITY, "official_split", *config.stratify_by])
    if twice := _twice(records):
        raise ValueError(f"{len(twice)} images occur more than once in the records, the first of them {twice[0]}")
    records = records.sort_by([("source", "ascending"), ("image_id", "ascending")])
    nodes, before, is_withheld = _with_previous(records, previous)
    group = _components(nodes)
    side = np.full(group.max(initial=-1) + 1, _NONE)
    np.maximum.at(side, group, before)
    np.maximum.at(side, group[: records.num_rows], _official(records))
    is_dead = np.zeros(len(side), bool)
    is_dead[group[is_withheld]] = True
    is_dead &= side == _NONE

    now = slice(0, records.num_rows)
    group, before, is_withheld = group[now], before[now], is_withheld[now]
    is_looser = (before != _NONE) & (before != side[group])
    is_out = is_looser | is_withheld | is_dead[group]
    _place(records, group, side, is_out, config)
    reasons: list[str | None] = [None] * records.num_rows
    for row in np.flatnonzero(is_out):
        reasons[row] = _reason(before[row], side[group[row]])
    return _table(records, group, np.where(is_out, _NONE, side[group]), reasons, previous)


def _official(records: pa.Table) -> Ints:
    split = pc.index_in(records["official_split"], value_set=pa.array(_BY_STRICTNESS))
    return np.asarray(split.fill_null(_NONE), np.int64)


def _reason(before: int, side: int) -> str:
    if before == _NONE:
        return "every image of its group that was there before is withheld"
    return f"was in {_BY_STRICTNESS[before]}; images added later join its group to images in {_BY_STRICTNESS[side]}"


def _check_columns(table: pa.Table, what: str, needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ValueError(f"{what} have no column {', '.join(missing)}; columns: {', '.join(table.column_names)}")


def _twice(table: pa.Table) -> list[str]:
    counts = pc.value_counts(_image_names(table))
    return sorted(counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist())


def _image_names(table: pa.Table) -> pa.Array:
    return pc.binary_join_element_wise(table["source"], table["image_id"], "/").combine_chunks()


def _with_previous(records: pa.Table, previous: pa.Table | None) -> tuple[pa.Table, Ints, npt.NDArray[np.bool_]]:
    """The records and, below them, the rows of `previous` that are gone; how each was split; whether it was withheld.

    An image that is gone still says on which side its lesion, patient or digest was.
    """
    nodes = records.select(_IDENTITY)
    if previous is None:
        return nodes, np.full(len(nodes), _NONE), np.zeros(len(nodes), bool)
    _check_columns(previous, "the previous splits", SPLIT_SCHEMA.names)
    if words := set(pc.unique(previous["split"]).to_pylist()) - {None, *_BY_STRICTNESS}:
        raise ValueError(f"the previous splits hold {sorted(words)}; allowed: {', '.join(Split)}")
    is_gone = pc.invert(pc.is_in(_image_names(previous), value_set=_image_names(records)))
    gone = previous.filter(is_gone).select(_IDENTITY)
    nodes = pa.concat_tables([nodes, gone], promote_options="permissive")
    place = pc.index_in(_image_names(nodes), value_set=_image_names(previous))
    split = pc.index_in(previous["split"], value_set=pa.array(_BY_STRICTNESS)).combine_chunks().take(place)
    before = np.asarray(split.fill_null(_NONE), np.int64)
    is_known = np.asarray(pc.is_valid(place))
    return nodes, before, is_known & (before == _NONE)


def _components(rows: pa.Table) -> Ints:
    """Number of each row's group, from 0: rows are joined by any name that they share."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    row, name, num_names = [], [], 0
    for _, names in shared_names(rows):
        codes = names.dictionary_encode()
        is_named = np.asarray(codes.is_valid())
        row.append(np.flatnonzero(is_named))
        name.append(np.asarray(codes.indices.drop_null(), np.int64) + num_names)
        num_names += len(codes.dictionary)
    edges = np.concatenate(row), np.concatenate(name) + len(rows)
    size = len(rows) + num_names
    graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][: len(rows)], np.int64)


def _place(records: pa.Table, group: Ints, side: Ints, is_out: npt.NDArray[np.bool_], config: SplitConfig) -> None:
    """Give every group without a side one, in `side`; rows that are out do not count.

    With c images of a stratum on a side of share f and t placed in all, the stratum's excess there is c - f t. A group
    of n_l images in stratum l changes the sum of squared excesses by a term that is the same for every side plus
    2 sum_l n_l (excess_l - f n_l), so the side with the least of these sums is the best one.
    """
    inside = np.flatnonzero(~is_out)
    group_of, strata = group[inside], [level[inside] for level in _strata(records, config)]
    is_placed = side[group_of] != _NONE
    if is_placed.all():
        return
    num_strata = 1 + max(int(level.max()) for level in strata)
    placed = [level[is_placed] for level in strata]
    excess = _excess(placed, side[group_of[is_placed]], num_strata, config.by_strictness)
    groups, begins, stratum, images = _new_groups(group_of[~is_placed], [level[~is_placed] for level in strata])
    parts = list(zip(stratum.tolist(), images.tolist(), strict=True))
    for position in _order(records, group, groups, config.seed):
        members = parts[begins[position] : begins[position + 1]]
        side[groups[position]] = _best_side(excess, members, config.by_strictness)


def _excess(strata: list[Ints], side: Ints, num_strata: int, shares: Sequence[float]) -> list[list[float]]:
    """Images of each stratum on each side, less those that should be."""
    counts = np.zeros((num_strata, len(shares)))
    for level in strata:
        np.add.at(counts, (level, side), 1)
    excess: list[list[float]] = (counts - counts.sum(1, keepdims=True) * np.array(shares)).tolist()
    return excess


def _new_groups(group: Ints, strata: list[Ints]) -> tuple[Ints, Ints, Ints, Ints]:
    """Groups, where each one's parts begin (and the last ends), and each part's stratum and number of images."""
    pairs = np.concatenate([np.stack([group, level]) for level in strata], axis=1)
    (group_of, stratum), images = np.unique(pairs, axis=1, return_counts=True)
    groups, begins = np.unique(group_of, return_index=True)
    return groups, np.append(begins, len(group_of)), stratum, images


def _best_side(excess: list[list[float]], parts: list[tuple[int, int]], shares: Sequence[float]) -> int:
    """The side for a group with these (stratum, images); `excess` is brought up to date."""
    costs = [
        sum(images * (excess[stratum][side] - share * images) for stratum, images in parts)
        for side, share in enumerate(shares)
    ]
    best = costs.index(min(costs))
    for stratum, images in parts:
        row = excess[stratum]
        for side, share in enumerate(shares):
            row[side] -= share * images
        row[best] += images
    return best


def _strata(records: pa.Table, config: SplitConfig) -> Iterator[Ints]:
    """Numbers of each row's stratum, level by level from the source to the finest; no number occurs in two levels."""
    level, num_strata = records["source"].combine_chunks(), 0
    for column in (None, *config.stratify_by):
        if column is not None:
            level = pc.binary_join_element_wise(level, records[column].combine_chunks().fill_null("unknown"), "/")
        codes = level.dictionary_encode()
        yield np.asarray(codes.indices, np.int64) + num_strata
        num_strata += len(codes.dictionary)


def _order(records: pa.Table, group: Ints, groups: Ints, seed: int) -> list[int]:
    """Positions in `groups` in an order that only the seed and each group's first image decide."""
    names = _image_names(records).take(pa.array(_first_rows(group)[groups])).to_pylist()
    digests = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names]
    return sorted(range(len(groups)), key=digests.__getitem__)


def _first_rows(group: Ints) -> Ints:
    """For each group number the first of its rows (0 for a group without rows)."""
    first = np.zeros(group.max(initial=-1) + 1, np.int64)
    numbers, rows = np.unique(group, return_index=True)
    first[numbers] = rows
    return first


def _table(
    records: pa.Table, group: Ints, split: Ints, reasons: list[str | None], previous: pa.Table | None
) -> pa.Table:
    names = _image_names(records)
    withheld = pa.array(reasons, pa.string())
    if previous is not None:
        place = pc.index_in(names, value_set=_image_names(previous))
        withheld = pc.coalesce(previous["withheld_reason"].combine_chunks().take(place), withheld)
    words = pa.array(_BY_STRICTNESS).take(pa.array(split, mask=split == _NONE))
    columns: dict[str, Any] = {name: records[name].combine_chunks() for name in _IDENTITY}
    columns |= {
        "group_id": names.take(pa.array(_first_rows(group)[group])),
        "split": words,
        "withheld_reason": withheld,
    }
    return pa.table([columns[name] for name in SPLIT_SCHEMA.names], schema=SPLIT_SCHEMA)


def gone_rows(previous: pa.Table | None, assigned: pa.Table) -> pa.Table:
    """The rows of `previous` whose images are not in `assigned`: kept beside it, and given along the next time."""
    if previous is None:
        return SPLIT_SCHEMA.empty_table()
    return previous.filter(pc.invert(pc.is_in(_image_names(previous), value_set=_image_names(assigned))))


def light_dark_split(records: pa.Table, *, seed: int = 0, num_per_label: int = 8) -> pa.Table:
    """From Majority to Minority's law (arXiv:2406.18375): learn from light skin and a few dark images, test on dark.

    Of every source label `num_per_label` images of skin types 5 and 6 are drawn, then as many of types 1 and 2. Train
    is all light images but the drawn ones, and the drawn dark ones; test is the other dark ones. The paper's code
    leaves the drawn light ones aside and picks its classifier on test; here they are val. Types 3, 4 and unknown are
    on no side. The draw depends on the order of the source's own table (concept `row`; else that of image_id):
    on the 2,707 rows of Fitz_subset it is the paper's split to the image.

    Where images of one group fall on different sides, the strictest keeps its own and the others are withheld.

    Args:
        records: rows of one or more sources, with `RECORD_SCHEMA`.
        seed: of the draw, as pandas takes it.
        num_per_label: images drawn of every label, once among the dark and once among the light.

    Raises:
        ValueError: a label has fewer light or dark images than are drawn.
    """
    records = records.sort_by([("source", "ascending"), ("image_id", "ascending")])
    tone, drawn = _drawn_by_label(records, seed, num_per_label)
    side = np.full(records.num_rows, _NONE)
    side[(tone == "light") & ~drawn | (tone == "dark") & drawn] = _BY_STRICTNESS.index(Split.TRAIN)
    side[(tone == "light") & drawn] = _BY_STRICTNESS.index(Split.VAL)
    side[(tone == "dark") & ~drawn] = _BY_STRICTNESS.index(Split.TEST)
    group = _components(records.select(_IDENTITY))
    strictest = np.full(group.max(initial=-1) + 1, _NONE)
    np.maximum.at(strictest, group, side)
    is_looser = (side != _NONE) & (side < strictest[group])
    reasons: list[str | None] = [None] * records.num_rows
    for row in np.flatnonzero(side == _NONE):
        reasons[row] = "its skin type is neither light (1, 2) nor dark (5, 6)"
    for row in np.flatnonzero(is_looser):
        reasons[row] = f"an image of its group is in {_BY_STRICTNESS[strictest[group[row]]]}"
    return _table(records, group, np.where(is_looser, _NONE, side), reasons, None)


def _drawn_by_label(records: pa.Table, seed: int, num_per_label: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Each row's coarse tone, and whether it was drawn among those of its label and tone."""
    rows = records.select(["source_label", "skin_type", "concepts"]).to_pandas()
    rows["tone"] = rows.skin_type.map({1: "light", 2: "light", 5: "dark", 6: "dark"}).fillna("")
    rows["row"] = [int(dict(concepts or ()).get("row", place)) for place, concepts in enumerate(rows.concepts)]
    rows = rows.sort_values("row", kind="stable")
    drawn = np.zeros(len(rows), bool)
    for tone in ("dark", "light"):
        of_tone = rows[rows.tone == tone]
        few = of_tone.source_label.value_counts().loc[lambda counts: counts < num_per_label]
        if len(few):
            label, count = few.index[0], few.iloc[0]
            raise ValueError(f"{label!r} has {count} images of {tone} skin; the light_dark split draws {num_per_label}")
        drawn[of_tone.groupby("source_label").sample(n=num_per_label, random_state=seed).index] = True
    return rows.sort_index().tone.to_numpy(), drawn


def split_problems(table: pa.Table) -> list[str]:
    """What is wrong with a table of splits, a sentence for each; none when nothing leaks.

    A lesion, patient, digest or archive image in two splits; an image with neither split nor reason, or with both; a
    word that is no split; an image in two rows.
    """
    names = _image_names(table)
    problems = [f"image {name} is in two rows" for name in _twice(table)]
    for name, split, reason in zip(names.to_pylist(), *_outcomes(table), strict=True):
        if split is not None and split not in _BY_STRICTNESS:
            problems.append(f"image {name} is in {split!r}, which is no split")
        if split is None and reason is None:
            problems.append(f"image {name} has no split and no reason for that")
        if split is not None and reason is not None:
            problems.append(f"image {name} is in {split} although it is withheld: {reason}")
    for kind, shared in shared_names(table):
        rows = pa.table({"shared": shared, "split": table["split"].combine_chunks(), "image": names})
        rows = rows.filter(pc.and_(shared.is_valid(), rows["split"].is_valid())).sort_by([("image", "ascending")])
        found = rows.group_by("shared", use_threads=False).aggregate(
            [("split", "count_distinct"), ("split", "distinct"), ("image", "list")]
        )
        for row in found.filter(pc.greater(found["split_count_distinct"], 1)).sort_by("shared").to_pylist():
            images = ", ".join(row["image_list"][:4]) + (", ..." if len(row["image_list"]) > 4 else "")
            problems.append(f"{kind} {row['shared']} is in {' and '.join(sorted(row['split_distinct']))}: {images}")
    return problems


def _outcomes(table: pa.Table) -> tuple[list[str | None], list[str | None]]:
    return table["split"].to_pylist(), table["withheld_reason"].to_pylist()
