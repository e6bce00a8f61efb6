"""Which images are there twice: the same bytes or the same archive image, and images that only look alike.

The first two join groups (see `sources.identity` and `splits`). Images that look alike are reported and join nothing: a
perceptual hash is no proof. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.sources.identity import shared_names

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

SHARED_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("num_images", pa.int64(), nullable=False),
        pa.field("num_sources", pa.int64(), nullable=False),
    ]
)
"""Columns of `shared_images`: kind is digest or image, name the digest or the archive's name."""

NEAR_DUPLICATE_SCHEMA = pa.schema(
    [
        pa.field("source_a", pa.string(), nullable=False),
        pa.field("image_a", pa.string(), nullable=False),
        pa.field("source_b", pa.string(), nullable=False),
        pa.field("image_b", pa.string(), nullable=False),
        pa.field("distance", pa.int32(), nullable=False),
        pa.field("same_bytes", pa.bool_(), nullable=False),
        pa.field("num_pairs", pa.int64(), nullable=False),
    ]
)
"""Columns of the near-duplicates: distance is the number of differing bits, num_pairs the image pairs that a row stands
for."""


class NearDuplicateConfig(BaseModel):
    """When two images count as looking alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_distance: int = Field(default=4, ge=0, le=16)
    """Bits of 64 in which two perceptual hashes may differ; nearly always even, since half of all bits are set.

    On HAM10000 (200 x 150) 4 finds at least 98.8 % of 600 images compressed again, halved in size, made brighter or
    tinted, and 41 % of those cropped by 5 % (6: 70 %). Of its 3,207 pairs of one lesion and 50 million of two it finds
    95 and 66 (2: 50 and 5; 6: 143 and 337; 10: 203 and 4,869)."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Rows kept of pairs with different hashes, the closest ones; those beyond are counted."""


@dataclass(frozen=True)
class NearDuplicates:
    """The images that look alike."""

    pairs: pa.Table
    """`NEAR_DUPLICATE_SCHEMA`, the closest first. Images with one hash are a group: each is named once, with the first
    of the group, and only the first stands for the group elsewhere."""
    num_pairs: dict[int, int]
    """Image pairs at each distance, also those that have no row of their own."""
    num_rows_left_out: int
    """Pairs of hashes beyond `max_rows`."""


def shared_images(records: pa.Table) -> pa.Table:
    """Every image that holds the same bytes, or is the same archive's image, as another: `SHARED_SCHEMA`.

    Args:
        records: rows of one or more sources, with `RECORD_SCHEMA`.

    Returns:
        A row for each image and name that it shares, ordered by kind, name, source and image_id.
    """
    tables = [SHARED_SCHEMA.empty_table()]
    for kind, names in shared_names(records):
        if kind not in ("digest", "image"):
            continue
        rows = pa.table({"name": names, "source": records["source"], "image_id": records["image_id"]})
        counted = _counted(rows.filter(names.is_valid()))
        counted = counted.filter(pc.greater(counted["num_images"], 1))
        counted = counted.append_column("kind", pa.repeat(pa.scalar(kind), counted.num_rows))
        tables.append(counted.select(SHARED_SCHEMA.names).cast(SHARED_SCHEMA))
    return pa.concat_tables(tables).sort_by([(name, "ascending") for name in SHARED_SCHEMA.names[:4]])


def join_counts(records: pa.Table) -> dict[str, dict[str, int]]:
    """How many images each kind of name joins to others.

    Args:
        records: rows of one or more sources, with `RECORD_SCHEMA`.

    Returns:
        For lesion, patient, digest and image (an archive's): num_names shared by several images, num_images_within that
        share theirs with another of their source, num_images_across that share theirs with an image of another source.
    """
    counts = {}
    for kind, names in shared_names(records):
        rows = _counted(pa.table({"name": names, "source": records["source"]}).filter(names.is_valid()))
        is_shared = pc.greater(rows["num_images"], 1)
        counts[kind] = {
            "num_names": pc.count_distinct(rows["name"].filter(is_shared)).as_py(),
            "num_images_within": pc.sum(pc.greater(rows["num_of_source"], 1)).as_py() or 0,
            "num_images_across": pc.sum(pc.greater(rows["num_sources"], 1)).as_py() or 0,
        }
    return counts


def _counted(rows: pa.Table) -> pa.Table:
    """The rows with, for each one's name, the number of images, of sources, and of images of its own source."""
    of_source = rows.group_by(["name", "source"]).aggregate([([], "count_all")])
    of_name = of_source.group_by("name").aggregate([("count_all", "sum"), ([], "count_all")])
    of_source = of_source.rename_columns({"count_all": "num_of_source"})
    of_name = of_name.rename_columns({"count_all_sum": "num_images", "count_all": "num_sources"})
    return rows.join(of_source, ["name", "source"]).join(of_name, "name")


def near_duplicates(statistics: pa.Table, config: NearDuplicateConfig | None = None) -> NearDuplicates:
    """All pairs of images whose perceptual hashes differ in few bits.

    Exact: of hashes that differ in at most d bits, cut into d + 1 bands, one band is equal (Manku, Jain and Das Sarma
    2007), so only hashes that share a band are compared. Memory grows with the images and `max_rows` only.

    Args:
        statistics: rows of one or more sources, with `STATISTICS_SCHEMA`.
        config: how close, and how many rows.
    """
    config = config or NearDuplicateConfig()
    statistics = statistics.select(["source", "image_id", "sha256", "phash"])
    statistics = statistics.sort_by([("source", "ascending"), ("image_id", "ascending")]).combine_chunks()
    hashes, first, group, sizes = np.unique(
        np.asarray(statistics["phash"], np.uint64), return_index=True, return_inverse=True, return_counts=True
    )
    kept = _Closest(config.max_rows)
    num_pairs = np.zeros(config.max_distance + 1, np.int64)
    num_pairs[0] = (sizes * (sizes - 1) // 2).sum()
    for left, right, distance in _close_pairs(hashes, config.max_distance):
        weight = sizes[left] * sizes[right]
        np.add.at(num_pairs, distance, weight)
        kept.add(np.stack([distance, first[left], first[right], weight]))
    members, standing = _members(group, first)
    same = np.stack([np.zeros_like(members), first[group[members]], members, standing])
    rows = np.concatenate([same, kept.closest()], axis=1)
    found = {distance: int(count) for distance, count in enumerate(num_pairs) if count}
    return NearDuplicates(_pair_table(statistics, rows), found, kept.num_left_out)


def in_two_splits(pairs: pa.Table, splits: pa.Table) -> pa.Table:
    """The near-duplicates whose images are in different splits, with the columns split_a and split_b.

    Args:
        pairs: `NEAR_DUPLICATE_SCHEMA`.
        splits: a table with source, image_id and split (null for an image that is in none) for every image of them.

    Raises:
        ValueError: an image has no row in `splits`.
    """
    names = pc.binary_join_element_wise(splits["source"], splits["image_id"], "/")
    for side in ("a", "b"):
        image = pc.binary_join_element_wise(pairs[f"source_{side}"], pairs[f"image_{side}"], "/")
        place = pc.index_in(image, value_set=names)
        if place.null_count:
            missing = image.filter(place.is_null())[0].as_py()
            raise ValueError(f"image {missing} has no row in the splits; near-duplicates must be of the same images")
        pairs = pairs.append_column(f"split_{side}", splits["split"].take(place))
    return pairs.filter(pc.not_equal(pairs["split_a"], pairs["split_b"]))


def _members(group: Ints, first: Ints) -> tuple[Ints, Ints]:
    """The images that are not the first of their hash, and for each the number of those before it."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(first)))
    before = np.arange(len(group)) - starts[group[order]]
    return order[before > 0], before[before > 0]


def _close_pairs(hashes: Hashes, max_distance: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Places a < b of different hashes and their distance, for every pair within `max_distance` once."""
    edges = [64 * band // (max_distance + 1) for band in range(max_distance + 2)]
    earlier: list[np.uint64] = []
    for begin, end in zip(edges, edges[1:], strict=False):
        mask = np.uint64((1 << end) - (1 << begin))
        order = np.argsort(hashes & mask, kind="stable")
        yield from _pairs_in_band(hashes[order], order, mask, earlier, max_distance)
        earlier.append(mask)


def _pairs_in_band(
    hashes: Hashes, order: Ints, mask: np.uint64, earlier: list[np.uint64], max_distance: int
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Pairs that agree in this band and in no earlier one. Equal bands stand together: compare each with its k-th next.

    Whoever shares the band with the k-th next shares it with all between, so the rows still to compare only grow fewer.
    """
    band = hashes & mask
    left, step = np.arange(len(hashes)), 0
    while len(left):
        step += 1
        left = left[: np.searchsorted(left, len(hashes) - step)]
        left = left[band[left] == band[left + step]]
        differing = hashes[left] ^ hashes[left + step]
        distance = np.bitwise_count(differing)
        is_close = np.flatnonzero(distance <= max_distance)
        for other in earlier:
            is_close = is_close[(differing[is_close] & other) != 0]
        if len(is_close):
            one, two = order[left[is_close]], order[left[is_close] + step]
            yield np.minimum(one, two), np.maximum(one, two), distance[is_close].astype(np.int64)


class _Closest:
    """The closest rows (distance, image, image, weight) among all that are added, in bounded memory."""

    def __init__(self, max_rows: int) -> None:
        self.num_left_out = 0
        self._max_rows = max_rows
        self._rows: list[Ints] = []
        self._num_held = 0

    def add(self, rows: Ints) -> None:
        self._rows.append(rows)
        self._num_held += rows.shape[1]
        if self._num_held > 2 * self._max_rows:
            self.closest()

    def closest(self) -> Ints:
        """The rows (4, n), at most `max_rows`, ordered by distance and then by image."""
        rows = np.concatenate(self._rows, axis=1) if self._rows else np.empty((4, 0), np.int64)
        rows[1:3] = np.sort(rows[1:3], axis=0)
        rows = rows[:, np.lexsort(rows[2::-1])]
        self.num_left_out += max(0, rows.shape[1] - self._max_rows)
        rows = rows[:, : self._max_rows]
        self._rows, self._num_held = [rows], rows.shape[1]
        return rows


def _pair_table(statistics: pa.Table, rows: Ints) -> pa.Table:
    distance, *images, num_pairs = rows[:, np.lexsort(rows[2::-1])]
    a, b = (statistics.take(pa.array(places)) for places in images)
    columns = [
        a["source"],
        a["image_id"],
        b["source"],
        b["image_id"],
        pa.array(distance, pa.int32()),
        pc.equal(a["sha256"], b["sha256"]),
        pa.array(num_pairs, pa.int64()),
    ]
    return pa.table(columns, schema=NEAR_DUPLICATE_SCHEMA)
