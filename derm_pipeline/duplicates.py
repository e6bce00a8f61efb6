"""Which images are there twice: the same bytes or the same archive image, and images that only look alike.

The first two join groups (see `sources.identity` and `splits`). Images that look alike are reported and join nothing:
looks are no proof. Nothing here reads a file.

Looking alike is found by perceptual hashes and checked by thumbnails. The hashes alone are not enough: the signs of a
few low frequencies agree by chance between pictures of one dark spot on plain skin. Within 8 bits HAM10000 (10,015
images at 200 x 150) has 169 pairs of one lesion and 1,391 of two, nearly all of them plainly different pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.images import Pixels
from derm_pipeline.sources.identity import shared_names
from derm_pipeline.sources.statistics import STATISTICS_SCHEMA, THUMBNAIL_PX

Floats = npt.NDArray[np.float32]
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
        pa.field("correlation", pa.float64(), nullable=False),
        pa.field("same_bytes", pa.bool_(), nullable=False),
        pa.field("num_pairs", pa.int64(), nullable=False),
    ]
)
"""Columns of the near-duplicates: distance is the number of differing bits, correlation that of `detail_correlations`
to three places, num_pairs the image pairs that a row stands for."""


class NearDuplicateConfig(BaseModel):
    """When two images count as looking alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_distance: int = Field(default=8, ge=0, le=16)
    """Bits of 64 in which two perceptual hashes may differ; nearly always even, since half of all bits are set."""
    min_correlation: float = Field(default=0.8, ge=0, le=1)
    """The least `detail_correlations` of two thumbnails.

    HAM10000 (200 x 150): of 9,600 changed copies of 800 images (compressed again, halved in size, brighter, darker,
    with more contrast, tinted, blurred, with noise) both bounds keep 99.99 %; of copies cropped by 5 % 82 %, by 10 %
    1 %. Of the pairs within 8 bits they keep 141 of 169 of one lesion (95 of 96 within 4 bits; the others are mostly
    taken from another place or distance), and 2 of 1,391 of two lesions. By eye these two are one lesion under two
    names each: ISIC_0025226 and ISIC_0030074, ISIC_0027027 and ISIC_0029036; two more such pairs have 0.757 and 0.719.
    The best pair of different pictures has 0.763, within 12 bits 0.788. Of 1,500 phantoms' 145 pairs of two lesions
    none is kept."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Rows kept of pairs with different hashes or thumbnails, the closest ones; those beyond are counted."""


@dataclass(frozen=True)
class NearDuplicates:
    """The images that look alike."""

    pairs: pa.Table
    """`NEAR_DUPLICATE_SCHEMA`, the closest first. Images with one hash and one thumbnail are a group: each is named
    once, with the first of the group, and only the first stands for the group elsewhere."""
    num_pairs: dict[int, int]
    """Image pairs that look alike at each distance, also those that have no row of their own."""
    num_told_apart: int
    """Image pairs with close hashes whose thumbnails differ; they have no row."""
    num_rows_left_out: int
    """Pairs of groups beyond `max_rows`."""


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
    """All pairs of images whose perceptual hashes differ in few bits and whose thumbnails show the same details.

    Exact: of hashes that differ in at most d bits, cut into d + 1 bands, one band is equal (Manku, Jain and Das Sarma
    2007), so only hashes that share a band are compared, and of all that are close the thumbnails. Memory grows with
    the images and `max_rows` only; time with the images and the pairs that are close, 2 microseconds each. 100,000
    images need 2 to 3 s of one core and 170 MB more, also if none shows anything; 100 films of 1,000 frames, 50 million
    pairs, 100 s.

    Args:
        statistics: rows of one or more sources, with `STATISTICS_SCHEMA`.
        config: how close, and how many rows.

    Raises:
        ValueError: the statistics have no thumbnails; an earlier version made them.
    """
    config = config or NearDuplicateConfig()
    _check_thumbnails(statistics)
    statistics = statistics.select(["source", "image_id", "sha256", "phash", "thumbnail"])
    statistics = statistics.sort_by([("source", "ascending"), ("image_id", "ascending")])
    hashes, thumbnails, first, group, sizes = _groups(statistics)
    statistics = statistics.drop_columns(["phash", "thumbnail"]).combine_chunks()
    kept = _Closest(config.max_rows)
    num_pairs = np.zeros(config.max_distance + 1, np.int64)
    num_pairs[0] = (sizes * (sizes - 1) // 2).sum()
    num_close = int(num_pairs[0])
    for left, right, distance in _close_pairs(hashes, config.max_distance):
        correlation = _correlations_of(thumbnails, left, right)
        weight = sizes[left] * sizes[right]
        num_close += int(weight.sum())
        rows = np.stack([distance, first[left], first[right], weight, np.rint(correlation * 1000).astype(np.int64)])
        rows = rows[:, correlation >= config.min_correlation]
        np.add.at(num_pairs, rows[0], rows[3])
        kept.add(rows)
    members, standing = _members(group, first)
    same = np.stack([np.zeros_like(members), first[group[members]], members, standing, np.full_like(members, 1000)])
    rows = np.concatenate([same, kept.closest()], axis=1)
    found = {distance: int(count) for distance, count in enumerate(num_pairs) if count}
    return NearDuplicates(_pair_table(statistics, rows), found, num_close - sum(found.values()), kept.num_left_out)


def detail_correlations(one: Pixels, two: Pixels) -> Floats:
    """How far each two thumbnails show the same details, (n,), -1 to 1; 1 for two that show none, 0 if only one does.

    The cosine between their 4-neighbour Laplacians (14 x 14), each value replaced by its square root with its sign.
    The Laplacian leaves out brightness and shading, which follow the instrument and the light; the root lets faint
    details count beside one dark spot's or a vignette's edge, which alone make plain correlations high. Of
    HAM10000's 169 pairs of one lesion within 8 bits the least bound that keeps no pair of different pictures keeps 143;
    with the gradients' correlation 114, with that of the grey values 106.

    Args:
        one: thumbnails (n, 16, 16), see `sources.statistics.thumbnails`.
        two: as many.
    """
    first, second = _details(one), _details(two)
    both = np.einsum("ij,ij->i", first, second)
    norm = np.sqrt(np.einsum("ij,ij->i", first, first) * np.einsum("ij,ij->i", second, second))
    plain = ~first.any(1) & ~second.any(1)
    return np.where(plain, np.float32(1), np.clip(both / np.maximum(norm, np.float32(1)), -1, 1))


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


def _check_thumbnails(statistics: pa.Table) -> None:
    names = statistics.schema.names
    if (
        "thumbnail" not in names
        or statistics.schema.field("thumbnail").type != STATISTICS_SCHEMA.field("thumbnail").type
    ):
        raise ValueError(
            "the statistics have no thumbnails to compare; an earlier version made them: scan the source again "
            f"(columns: {', '.join(names)})"
        )


def _groups(statistics: pa.Table) -> tuple[Hashes, Pixels, Ints, Ints, Ints]:
    """Different hashes (g,) and thumbnails (g, 16, 16), first image (g,), group (n,), images in each (g,)."""
    hashes = np.asarray(statistics["phash"], np.uint64)
    pixels = np.frombuffer(b"".join(statistics["thumbnail"].to_pylist()), np.uint8).reshape(
        len(hashes), THUMBNAIL_PX**2
    )
    looks = np.concatenate([hashes.astype(">u8").view(np.uint8).reshape(-1, 8), pixels], axis=1)
    looks = looks.reshape(-1).view(np.dtype((np.void, 8 + THUMBNAIL_PX**2)))
    _, first, group, sizes = np.unique(looks, return_index=True, return_inverse=True, return_counts=True)
    return hashes[first], pixels[first].reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX), first, group, sizes


def _details(thumbnails: Pixels) -> Floats:
    """Signed square roots of the Laplacians of thumbnails (n, 16, 16), (n, 196)."""
    pixels = thumbnails.astype(np.float32)
    around = pixels[:, :-2, 1:-1] + pixels[:, 2:, 1:-1] + pixels[:, 1:-1, :-2] + pixels[:, 1:-1, 2:]
    laplacian = (4 * pixels[:, 1:-1, 1:-1] - around).reshape(len(pixels), (THUMBNAIL_PX - 2) ** 2)
    return np.copysign(np.sqrt(np.abs(laplacian)), laplacian)


_COMPARED = 4096
"""Pairs of thumbnails that are compared at once: about 20 MB."""


def _correlations_of(thumbnails: Pixels, left: Ints, right: Ints) -> Floats:
    chunks = [slice(start, start + _COMPARED) for start in range(0, len(left), _COMPARED)]
    return np.concatenate([detail_correlations(thumbnails[left[part]], thumbnails[right[part]]) for part in chunks])


def _members(group: Ints, first: Ints) -> tuple[Ints, Ints]:
    """The images that are not the first of their group, and for each the number of those before it."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(first)))
    before = np.arange(len(group)) - starts[group[order]]
    return order[before > 0], before[before > 0]


def _close_pairs(hashes: Hashes, max_distance: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Places a < b of hashes and their distance, for every pair within `max_distance` once."""
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
    """The closest rows (distance, image, image, weight, correlation) among all that are added, in bounded memory."""

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
        """The rows (5, n), at most `max_rows`, ordered by distance and then by image."""
        rows = np.concatenate(self._rows, axis=1) if self._rows else np.empty((5, 0), np.int64)
        rows[1:3] = np.sort(rows[1:3], axis=0)
        rows = rows[:, np.lexsort(rows[2::-1])]
        self.num_left_out += max(0, rows.shape[1] - self._max_rows)
        rows = rows[:, : self._max_rows]
        self._rows, self._num_held = [rows], rows.shape[1]
        return rows


def _pair_table(statistics: pa.Table, rows: Ints) -> pa.Table:
    distance, *images, num_pairs, correlation = rows[:, np.lexsort(rows[2::-1])]
    a, b = (statistics.take(pa.array(places)) for places in images)
    columns = [
        a["source"],
        a["image_id"],
        b["source"],
        b["image_id"],
        pa.array(distance, pa.int32()),
        pa.array(correlation / 1000),
        pc.equal(a["sha256"], b["sha256"]),
        pa.array(num_pairs, pa.int64()),
    ]
    return pa.table(columns, schema=NEAR_DUPLICATE_SCHEMA)
