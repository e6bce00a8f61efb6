"""Every pair within the distance is found once or counted; what is shared is found across sources."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations

import cv2
import numpy as np
import pyarrow as pa
import pytest
from scipy.signal import convolve2d

from derm_pipeline.duplicates import (
    NEAR_DUPLICATE_SCHEMA,
    SHARED_SCHEMA,
    NearDuplicateConfig,
    detail_correlations,
    in_two_splits,
    join_counts,
    near_duplicates,
    shared_images,
)
from derm_pipeline.images import Pixels, decode, encode_jpeg, to_square
from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan
from derm_pipeline.sources.statistics import STATISTICS_SCHEMA, THUMBNAIL_PX, WORK_PX, measure


def noise(count: int) -> Pixels:
    return np.random.default_rng().integers(0, 256, (count, THUMBNAIL_PX, THUMBNAIL_PX)).astype(np.uint8)


def table(hashes, sources=None, digests=None, thumbnails=None) -> pa.Table:
    """Statistics of images with these hashes; without thumbnails all have the same."""
    count = len(hashes)
    thumbnails = np.repeat(noise(1), count, axis=0) if thumbnails is None else thumbnails
    columns = {
        "source": pa.array(sources or ["x"] * count, pa.string()),
        "image_id": pa.array([f"I{number:06d}" for number in range(count)], pa.string()),
        "sha256": pa.array(digests or [f"d{number}" for number in range(count)], pa.string()),
        "phash": pa.array(np.asarray(hashes, np.uint64)),
        "thumbnail": pa.array([one.tobytes() for one in thumbnails], STATISTICS_SCHEMA.field("thumbnail").type),
    }
    return pa.table(columns)


def planted(rng, count: int, num_planted: int) -> np.ndarray:
    """Random hashes, and copies of some with 0 to 8 bits changed."""
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    copies = []
    for one in rng.choice(hashes, num_planted):
        bits = rng.choice(64, rng.integers(0, 9), replace=False).astype(np.uint64)
        copies.append(one ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0)))
    return rng.permutation(np.concatenate([hashes, np.array(copies, np.uint64)]))


def all_pairs(hashes: np.ndarray, max_distance: int) -> dict[tuple[int, int], int]:
    found = {}
    for one, two in combinations(range(len(hashes)), 2):
        distance = int(hashes[one] ^ hashes[two]).bit_count()
        if distance <= max_distance:
            found[one, two] = distance
    return found


@pytest.mark.parametrize("max_distance", [0, 1, 3, 4, 6, 9, 16])
def test_the_pairs_are_those_of_comparing_all_with_all(max_distance):
    rng = np.random.default_rng()
    hashes = planted(rng, 300, 100)
    expected = all_pairs(hashes, max_distance)
    found = near_duplicates(table(hashes), NearDuplicateConfig(max_distance=max_distance))
    assert found.pairs.schema == NEAR_DUPLICATE_SCHEMA
    assert found.num_pairs == dict(sorted(Counter(expected.values()).items()))
    assert sum(found.pairs["num_pairs"].to_pylist()) == len(expected)
    rows = [(int(row["image_a"][1:]), int(row["image_b"][1:]), row["distance"]) for row in found.pairs.to_pylist()]
    assert all(expected[a, b] == distance for a, b, distance in rows)
    assert [distance for *_, distance in rows] == sorted(distance for *_, distance in rows)
    single = {(a, b) for a, b in expected if (hashes == hashes[a]).sum() == 1 == (hashes == hashes[b]).sum()}
    assert single <= {(a, b) for a, b, _ in rows}


LAPLACIAN = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])


def correlation(one: np.ndarray, two: np.ndarray) -> float:
    details = [convolve2d(image.astype(float), LAPLACIAN, mode="valid") for image in (one, two)]
    first, second = (np.sign(detail) * np.abs(detail) ** 0.5 for detail in details)
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def families(rng, count: int) -> tuple[np.ndarray, Pixels]:
    """Hashes a few bits from one of a few, and thumbnails more or less like one of a few, many of either alike."""
    hashes = rng.integers(0, 2**64, 4, dtype=np.uint64)[rng.integers(0, 4, count)]
    for _ in range(5):
        bit = np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
        hashes = np.where(rng.random(count) < 0.5, hashes, hashes ^ bit)
    spread = rng.choice([0, 30, 60, 120], count)[:, None, None]
    changed = noise(3)[rng.integers(0, 3, count)] + spread * rng.standard_normal((count, THUMBNAIL_PX, THUMBNAIL_PX))
    return hashes, np.clip(changed, 0, 255).astype(np.uint8)


def test_of_the_pairs_with_close_hashes_those_stay_whose_thumbnails_show_the_same_details():
    rng = np.random.default_rng()
    hashes, thumbnails = families(rng, 150)
    config = NearDuplicateConfig(max_distance=6, min_correlation=0.7)
    close = all_pairs(hashes, config.max_distance)
    alike = {pair: correlation(*thumbnails[list(pair)]) for pair in close}
    expected = {pair: value for pair, value in alike.items() if value >= config.min_correlation}
    assert 0 < len(expected) < len(close)
    found = near_duplicates(table(hashes, thumbnails=thumbnails), config)
    assert found.num_pairs == dict(sorted(Counter(close[pair] for pair in expected).items()))
    assert found.num_told_apart == len(close) - len(expected)
    assert sum(found.pairs["num_pairs"].to_pylist()) == len(expected)
    for row in found.pairs.to_pylist():
        pair = int(row["image_a"][1:]), int(row["image_b"][1:])
        assert row["distance"] == close[pair]
        assert row["correlation"] == pytest.approx(expected[pair], abs=6e-4)


def test_details_are_those_of_a_convolution_and_light_and_contrast_change_nothing():
    one, two = noise(20), noise(20)
    expected = [correlation(*pair) for pair in zip(one, two, strict=True)]
    assert detail_correlations(one, two) == pytest.approx(expected, abs=1e-5)
    assert detail_correlations(one, one) == pytest.approx(np.ones(20), abs=1e-5)
    assert detail_correlations(one, 255 - one) == pytest.approx(-np.ones(20), abs=1e-5)
    assert detail_correlations(one // 2, one // 2 * 2 + 1) == pytest.approx(np.ones(20), abs=1e-5)
    shading = np.arange(THUMBNAIL_PX, dtype=np.uint8)
    assert detail_correlations(one // 2 + shading, one // 2) == pytest.approx(np.ones(20), abs=1e-5)


def test_thumbnails_without_any_detail_are_like_each_other_only():
    plain = np.zeros((2, THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    assert detail_correlations(plain, plain[:, :1] + np.arange(THUMBNAIL_PX, dtype=np.uint8)[:, None]).tolist() == [
        1,
        1,
    ]
    assert detail_correlations(plain, noise(2)).tolist() == [0, 0]
    assert detail_correlations(plain[:0], plain[:0]).shape == (0,)


def test_one_hash_is_not_enough():
    one, other = noise(2)
    hardly = one.copy()
    hardly[5, 5] ^= 128
    found = near_duplicates(table([9] * 5, thumbnails=[one, other, one, hardly, other]))
    rows = [(row["image_a"], row["image_b"], row["correlation"], row["num_pairs"]) for row in found.pairs.to_pylist()]
    assert [(a, b, pairs) for a, b, _, pairs in rows] == [
        ("I000000", "I000002", 1),
        ("I000000", "I000003", 2),
        ("I000001", "I000004", 1),
    ]
    assert rows[0][2] == rows[2][2] == 1
    assert 0.8 < rows[1][2] < 1
    assert (found.num_pairs, found.num_told_apart) == ({0: 4}, 6)


def test_a_changed_copy_of_an_image_is_found_and_other_images_are_not():
    seed = int(np.random.default_rng().integers(10**6))
    cases = plan(PhantomConfig(num_images=150, seed=seed, p_vignette=0.4))
    originals = [draw(case, 160, 120).image for case in cases]
    squares = np.stack([to_square(image, WORK_PX, "squash") for image in [*originals, *map(changed, originals)]])
    columns = measure(squares).to_pydict()
    pixels = np.stack([np.frombuffer(one, np.uint8).reshape(THUMBNAIL_PX, -1) for one in columns["thumbnail"]])
    found = near_duplicates(table(columns["phash"], thumbnails=pixels)).pairs
    pairs = {(int(row["image_a"][1:]), int(row["image_b"][1:])) for row in found.to_pylist()}
    copies = {(number, number + 150) for number in range(150)}
    assert len(pairs & copies) >= 0.95 * len(copies)
    lesions = [case.lesion_id for case in cases]
    others = [(a, b) for a, b in pairs if lesions[a % 150] != lesions[b % 150]]
    assert len(others) <= 1


def changed(image: Pixels) -> Pixels:
    """The image halved, brighter, with another tint, and compressed again."""
    half = cv2.resize(image, (80, 60), interpolation=cv2.INTER_AREA)
    return decode(encode_jpeg(np.clip(half * np.array([1.1, 1.05, 0.95]) + 4, 0, 255).astype(np.uint8), quality=60))


def test_statistics_of_an_earlier_version_are_refused():
    rows = table([1, 2])
    for earlier in (rows.drop_columns("thumbnail"), rows.set_column(4, "thumbnail", pa.array(["a", "b"]))):
        with pytest.raises(ValueError, match="have no thumbnails.*scan the source again"):
            near_duplicates(earlier)


def test_hashes_that_crowd_in_few_bits_are_compared_all_the_same():
    rng = np.random.default_rng()
    hashes = rng.integers(0, 2**9, 250, dtype=np.uint64) << np.uint64(rng.integers(0, 50))
    found = near_duplicates(table(hashes), NearDuplicateConfig(max_distance=4))
    assert found.num_pairs == dict(sorted(Counter(all_pairs(hashes, 4).values()).items()))


def test_images_with_one_hash_are_named_once_each_and_all_their_pairs_are_counted():
    count = 3000
    hashes = [0] * count + [3] * 5
    found = near_duplicates(table(hashes))
    assert found.num_pairs == {0: count * (count - 1) // 2 + 10, 2: 5 * count}
    assert found.pairs.num_rows == count - 1 + 4 + 1
    named = {image for side in "ab" for image in found.pairs[f"image_{side}"].to_pylist()}
    assert len(named) == count + 5
    assert found.pairs["num_pairs"].to_pylist()[-1] == 5 * count


def test_rows_beyond_the_bound_are_the_farthest_and_are_counted():
    rng = np.random.default_rng()
    hashes = np.unique(rng.integers(0, 2**10, 300, dtype=np.uint64))
    whole = near_duplicates(table(hashes))
    for max_rows in (1, 10, 500):
        few = near_duplicates(table(hashes), NearDuplicateConfig(max_rows=max_rows))
        assert few.num_pairs == whole.num_pairs
        assert few.pairs.num_rows == max_rows
        assert few.num_rows_left_out == whole.pairs.num_rows - max_rows
        assert few.pairs.equals(whole.pairs.slice(0, max_rows))


def test_the_order_of_rows_changes_nothing():
    rng = np.random.default_rng()
    rows = table(planted(rng, 200, 80))
    shuffled = rows.take(rng.permutation(rows.num_rows))
    assert near_duplicates(rows).pairs.equals(near_duplicates(shuffled).pairs)


def test_the_same_bytes_are_told_from_the_same_looks_and_sources_are_compared():
    found = near_duplicates(table([5, 5, 5], ["a", "b", "b"], ["d", "d", "e"])).pairs.to_pylist()
    assert [(row["source_a"], row["source_b"], row["same_bytes"]) for row in found] == [
        ("a", "b", True),
        ("a", "b", False),
    ]


def test_no_images_have_no_duplicates():
    for hashes in ([], [7]):
        found = near_duplicates(table(hashes))
        assert (found.pairs.num_rows, found.num_pairs, found.num_rows_left_out) == (0, {}, 0)


def test_a_hundred_thousand_hashes_take_seconds():
    rng = np.random.default_rng()
    start = time.process_time()
    found = near_duplicates(table(planted(rng, 100_000, 500)))
    assert time.process_time() - start < 15
    assert sum(found.num_pairs.values()) > 400


def test_images_that_look_alike_in_two_splits_are_told():
    pairs = near_duplicates(table([0, 0, 3])).pairs
    splits = table([0, 0, 3]).append_column("split", pa.array(["train", "train", "test"]))
    found = in_two_splits(pairs, splits)
    assert found.select(["image_b", "split_a", "split_b"]).to_pylist() == [
        {"image_b": "I000002", "split_a": "train", "split_b": "test"}
    ]
    withheld = splits.set_column(5, "split", pa.array(["train", "train", None]))
    assert in_two_splits(pairs, withheld).num_rows == 0
    with pytest.raises(ValueError, match="x/I000001 has no row in the splits"):
        in_two_splits(pairs, splits.take([0, 2]))


def records(rows: list[tuple[str, str, str, str | None, str | None]]) -> pa.Table:
    names = ("source", "image_id", "sha256", "lesion_id", "patient_id")
    return pa.table(
        {name: pa.array(column, pa.string()) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    )


HAM_AND_ISIC = [
    ("ham10000", "ISIC_0024306", "a", "HAM_0000001", None),
    ("ham10000", "ISIC_0024307", "a", "HAM_0000001", None),
    ("ham10000", "ISIC_0024308", "b", "own", None),
    ("isic2019", "ISIC_0024306_downsampled", "c", "HAM_0000001", None),
    ("isic2019", "ISIC_0024308", "b", "own", "P1"),
    ("isic2019", "ISIC_0099999", "d", None, "P1"),
]


def test_shared_images_are_named_by_archive_name_and_by_digest():
    found = shared_images(records(HAM_AND_ISIC))
    assert found.schema == SHARED_SCHEMA
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        ("digest", "a", "ham10000", "ISIC_0024306", 2, 1),
        ("digest", "a", "ham10000", "ISIC_0024307", 2, 1),
        ("digest", "b", "ham10000", "ISIC_0024308", 2, 2),
        ("digest", "b", "isic2019", "ISIC_0024308", 2, 2),
        ("image", "ISIC_0024306", "ham10000", "ISIC_0024306", 2, 2),
        ("image", "ISIC_0024306", "isic2019", "ISIC_0024306_downsampled", 2, 2),
        ("image", "ISIC_0024308", "ham10000", "ISIC_0024308", 2, 2),
        ("image", "ISIC_0024308", "isic2019", "ISIC_0024308", 2, 2),
    ]


def test_joins_are_counted_within_and_across_sources():
    assert join_counts(records(HAM_AND_ISIC)) == {
        "lesion": {"num_names": 1, "num_images_within": 2, "num_images_across": 3},
        "patient": {"num_names": 1, "num_images_within": 2, "num_images_across": 0},
        "digest": {"num_names": 2, "num_images_within": 2, "num_images_across": 2},
        "image": {"num_names": 2, "num_images_within": 0, "num_images_across": 4},
    }


def test_sources_without_anything_in_common_join_nothing():
    rows = records([("a", "1", "x", None, None), ("b", "1", "y", "L", ""), ("c", "1", "z", "L", "")])
    assert shared_images(rows).num_rows == 0
    assert join_counts(rows) == dict.fromkeys(
        ("lesion", "patient", "digest", "image"), {"num_names": 0, "num_images_within": 0, "num_images_across": 0}
    )
