"""Splits: no leak, no move, the shares met; whatever the order and however often data is added."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pydantic import ValidationError

from derm_pipeline.records import RECORD_SCHEMA, Diagnosis, SkinTone, Split
from derm_pipeline.splits import SPLIT_SCHEMA, SplitConfig, assign_splits, light_dark_split, split_problems

CONFIG = SplitConfig()


def image(number: int, **known) -> dict:
    usual = {
        "source": "a",
        "image_id": f"x{number}",
        "file": f"x{number}.jpg",
        "sha256": f"digest {number}",
        "size_bytes": 1,
        "width_px": 1,
        "height_px": 1,
        "modality": "dermoscopic",
        "diagnosis": "nv",
        "source_label": "nv",
        "malignant": False,
    }
    return dict.fromkeys(RECORD_SCHEMA.names) | usual | {"concepts": []} | known


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def some_images(rng: np.random.Generator, number: int, sources: tuple[str, ...] = ("a", "b")) -> list[dict]:
    """Images with lesions within patients, a few shared bytes, and archive names that occur in both sources."""
    rows = []
    for index in range(number):
        source = sources[rng.integers(len(sources))]
        patient = int(rng.integers(number // 2 + 1))
        archive = rng.random() < 0.2
        known = {
            "source": source,
            "image_id": f"ISIC_{rng.integers(number):07d}" if archive else f"x{index}",
            "sha256": f"digest {rng.integers(number * 6)}",
            "lesion_id": f"{patient}-{rng.integers(3)}" if rng.random() < 0.8 else None,
            "patient_id": f"{patient}" if rng.random() < 0.6 else None,
            "diagnosis": str(rng.choice(list(Diagnosis)[:7], p=[0.05, 0.05, 0.1, 0.05, 0.1, 0.6, 0.05])),
            "skin_tone": str(rng.choice(list(SkinTone))) if rng.random() < 0.8 else None,
        }
        rows.append(image(index, **known))
    return list({(row["source"], row["image_id"]): row for row in rows}.values())


def by_image(splits: pa.Table) -> dict[tuple[str, str], str | None]:
    return {(row["source"], row["image_id"]): row["split"] for row in splits.to_pylist()}


def components(rows: list[dict]) -> set[frozenset[tuple[str, str]]]:
    """The groups by brute force: join whatever shares a name until nothing changes."""
    group = {(row["source"], row["image_id"]): {(row["source"], row["image_id"])} for row in rows}
    members = defaultdict(list)
    for row in rows:
        key = (row["source"], row["image_id"])
        members["digest", row["sha256"]].append(key)
        for name in ("lesion_id", "patient_id"):
            if row[name] is not None:
                members[name, row["source"], row[name]].append(key)
        if row["image_id"].startswith("ISIC_"):
            members["image", row["image_id"]].append(key)
    for keys in members.values():
        joined = set().union(*(group[key] for key in keys))
        for key in joined:
            group[key] = joined
    return {frozenset(joined) for joined in group.values()}


@pytest.mark.parametrize("number", [1, 30, 400])
def test_groups_are_the_connected_components_and_lie_on_one_side(number):
    rows = some_images(np.random.default_rng(), number)
    splits = assign_splits(table(rows), None, CONFIG)
    assert splits.schema == SPLIT_SCHEMA
    found = defaultdict(set)
    sides = defaultdict(set)
    for row in splits.to_pylist():
        found[row["group_id"]].add((row["source"], row["image_id"]))
        sides[row["group_id"]].add(row["split"])
        assert row["withheld_reason"] is None
    assert {frozenset(keys) for keys in found.values()} == components(rows)
    assert all(len(side) == 1 and side <= set(Split) for side in sides.values())
    assert split_problems(splits) == []


def test_the_order_of_rows_changes_nothing():
    rng = np.random.default_rng()
    rows = some_images(rng, 300)
    splits = assign_splits(table(rows), None, CONFIG)
    shuffled = [rows[index] for index in rng.permutation(len(rows))]
    assert assign_splits(table(shuffled), None, CONFIG).equals(splits)
    previous = splits.take(rng.permutation(len(splits)))
    assert assign_splits(table(shuffled), previous, CONFIG).equals(splits)


@pytest.mark.parametrize("repeat", range(5))
def test_data_may_be_added_in_any_order_without_a_leak_or_a_change_of_side(repeat):
    rng = np.random.default_rng()
    rows = some_images(rng, 400)
    order = rng.permutation(len(rows))
    previous, sides = None, {}
    for end in sorted({*rng.integers(1, len(rows), 5).tolist(), len(rows)}):
        part = [rows[index] for index in order[:end]]
        splits = assign_splits(table(part), previous, SplitConfig(seed=int(rng.integers(9))))
        assert split_problems(splits) == []
        now = by_image(splits)
        for key, side in sides.items():
            assert now[key] in {side, None}
            assert side is not None or now[key] is None
        assert splits.equals(assign_splits(table(part), splits, CONFIG))
        previous, sides = splits, now


def test_adding_a_source_that_shares_nothing_moves_nobody_even_without_the_previous_table():
    rng = np.random.default_rng()
    rows = some_images(rng, 200, ("a",))
    other = [
        row | {"sha256": "b" + row["sha256"]} for row in some_images(rng, 300, ("b",)) if row["image_id"][0] == "x"
    ]
    alone = by_image(assign_splits(table(rows), None, CONFIG))
    both = by_image(assign_splits(table(rows + other), None, CONFIG))
    assert {key: both[key] for key in alone} == alone


def test_the_shares_hold_for_every_diagnosis_and_tone():
    rng = np.random.default_rng()
    rows = [
        image(
            index,
            lesion_id=f"{index // 2}" if index < 1500 else None,
            diagnosis=str(rng.choice(list(Diagnosis)[:7], p=[0.05, 0.05, 0.1, 0.02, 0.1, 0.6, 0.08])),
            skin_tone=str(rng.choice(list(SkinTone), p=[0.5, 0.35, 0.15])),
        )
        for index in range(3000)
    ]
    splits = by_image(
        assign_splits(table(rows), None, SplitConfig(train_fraction=0.5, val_fraction=0.2, test_fraction=0.3))
    )
    for stratum in (("source",), ("diagnosis",), ("diagnosis", "skin_tone")):
        counts = defaultdict(Counter)
        for row in rows:
            tone = "" if "skin_tone" not in stratum else row["skin_tone"]
            counts[row[stratum[0]], tone][splits[row["source"], row["image_id"]]] += 1
        for of_stratum in counts.values():
            total = sum(of_stratum.values())
            for split, share in ((Split.TRAIN, 0.5), (Split.VAL, 0.2), (Split.TEST, 0.3)):
                assert abs(of_stratum[split] - share * total) <= 5


def test_new_groups_fill_what_is_missing():
    rows = [image(index) for index in range(100)]
    lopsided = assign_splits(table(rows), None, SplitConfig(train_fraction=1, val_fraction=0, test_fraction=0))
    assert set(lopsided["split"].to_pylist()) == {"train"}
    more = rows + [image(index) for index in range(100, 160)]
    splits = by_image(assign_splits(table(more), lopsided, CONFIG))
    assert Counter(splits.values()) == {"train": 104, "val": 16, "test": 40}


def test_a_share_of_nothing_gets_nothing():
    rows = some_images(np.random.default_rng(), 200)
    splits = assign_splits(table(rows), None, SplitConfig(train_fraction=0.7, val_fraction=0, test_fraction=0.3))
    assert set(splits["split"].to_pylist()) == {"train", "test"}


def test_the_seed_decides_who_goes_where():
    rows = [image(index) for index in range(200)]
    first, second = (by_image(assign_splits(table(rows), None, SplitConfig(seed=seed))) for seed in (1, 2))
    assert Counter(first.values()) == Counter(second.values())
    assert first != second


def previously(rows: list[dict], sides: list[Split]) -> pa.Table:
    """A previous table in which each of the rows is on the given side."""
    splits = assign_splits(table(rows), None, CONFIG).to_pylist()
    wanted = {row["image_id"]: side for row, side in zip(rows, sides, strict=True)}
    return pa.Table.from_pylist([row | {"split": wanted[row["image_id"]]} for row in splits], schema=SPLIT_SCHEMA)


@pytest.mark.parametrize("strictest", [Split.VAL, Split.TEST])
def test_where_new_images_join_two_sides_the_looser_one_is_withheld_for_good(strictest):
    rows = [image(0, lesion_id="l"), image(1, patient_id="p"), image(2, lesion_id="l"), image(3, sha256="s")]
    previous = previously(rows, [Split.TRAIN, strictest, Split.TRAIN, Split.TRAIN])
    rows.append(image(4, lesion_id="l", patient_id="p"))
    splits = assign_splits(table(rows), previous, CONFIG)
    assert by_image(splits) == {
        ("a", "x0"): None,
        ("a", "x1"): strictest,
        ("a", "x2"): None,
        ("a", "x3"): Split.TRAIN,
        ("a", "x4"): strictest,
    }
    reasons = dict(zip(splits["image_id"].to_pylist(), splits["withheld_reason"].to_pylist(), strict=True))
    assert reasons["x0"].startswith("was in train")
    assert reasons["x0"].endswith(f"to images in {strictest}")
    # The images that were kept go, and a new one of the withheld lesion comes: it may be on no side either.
    rows[4:] = [image(5, lesion_id="l")]
    without = splits.filter(pa.array([name not in {"x1", "x4"} for name in splits["image_id"].to_pylist()]))
    after = assign_splits(table([rows[0], *rows[2:]]), without, CONFIG)
    assert by_image(after)["a", "x0"] is None
    assert by_image(after)["a", "x5"] is None
    assert (
        dict(zip(after["image_id"].to_pylist(), after["withheld_reason"].to_pylist(), strict=True))["x0"]
        == reasons["x0"]
    )
    assert split_problems(after) == []


def test_a_renamed_image_and_a_new_one_of_a_lesion_that_is_gone_keep_the_side():
    rows = [image(0, lesion_id="l"), image(1)]
    for side in Split:
        previous = previously(rows, [side, side])
        new = [image(7, lesion_id="l"), image(8, sha256="digest 1")]
        assert by_image(assign_splits(table(new), previous, CONFIG)) == {("a", "x7"): side, ("a", "x8"): side}


def test_an_image_whose_content_changed_keeps_its_side():
    rows = [image(index) for index in range(20)]
    splits = assign_splits(table(rows), None, CONFIG)
    changed = [image(index, sha256=f"new {index}") for index in range(20)]
    assert by_image(assign_splits(table(changed), splits, CONFIG)) == by_image(splits)


@pytest.mark.parametrize(
    ("first", "second", "is_joined"),
    [
        ({"lesion_id": "l"}, {"lesion_id": "l"}, True),
        ({"patient_id": "p"}, {"patient_id": "p"}, True),
        ({"lesion_id": "7"}, {"patient_id": "7"}, False),
        ({"lesion_id": "l"}, {"lesion_id": "l", "source": "b"}, False),
        ({"lesion_id": "HAM_0000118"}, {"lesion_id": "HAM_0000118", "source": "b"}, True),
        ({"lesion_id": ""}, {"lesion_id": ""}, False),
        ({"sha256": "s"}, {"sha256": "s", "source": "b"}, True),
        ({"image_id": "ISIC_0000091"}, {"image_id": "ISIC_0000091", "source": "b"}, True),
        ({"image_id": "ISIC_0000091"}, {"image_id": "ISIC_0000091_downsampled", "source": "b"}, True),
        ({"image_id": "ISIC_0000091"}, {"image_id": "ISIC_0000092", "source": "b"}, False),
        ({"image_id": "x"}, {"image_id": "x", "source": "b"}, False),
    ],
)
def test_what_joins_two_images(first, second, is_joined):
    splits = assign_splits(table([image(0, **first), image(1, **second)]), None, CONFIG)
    assert (len(set(splits["group_id"].to_pylist())) == 1) == is_joined


@pytest.mark.parametrize("known", [{"lesion_id": "l"}, {"patient_id": "p"}, {"sha256": "s"}])
def test_a_leak_is_a_sentence_that_names_it(known):
    rows = [image(0, **known), image(1, **known), image(2)]
    problems = split_problems(previously(rows, [Split.TRAIN, Split.TEST, Split.VAL]))
    (problem,) = problems
    assert next(iter(known.values())) in problem
    assert "is in test and train: a/x0, a/x1" in problem


def test_an_archive_image_on_two_sides_is_a_leak():
    rows = [image(0, image_id="ISIC_0000001"), image(1, image_id="ISIC_0000001_downsampled", source="b")]
    assert split_problems(previously(rows, [Split.VAL, Split.TEST])) == [
        "image ISIC_0000001 is in test and val: a/ISIC_0000001, b/ISIC_0000001_downsampled"
    ]


def test_other_faults_of_a_table_are_sentences_too():
    rows = assign_splits(table([image(0), image(1), image(2)]), None, CONFIG).to_pylist()
    rows[0] |= {"split": None}
    rows[1] |= {"split": "holdout"}
    rows[2] |= {"withheld_reason": "because"}
    problems = split_problems(pa.Table.from_pylist([*rows, rows[2]], schema=SPLIT_SCHEMA))
    assert any("a/x0 has no split and no reason" in problem for problem in problems)
    assert any("a/x1 is in 'holdout'" in problem for problem in problems)
    assert any("a/x2 is in" in problem and "because" in problem for problem in problems)
    assert "image a/x2 is in two rows" in problems


def test_no_records_give_no_splits():
    nothing = assign_splits(table([]), None, CONFIG)
    assert nothing.num_rows == 0
    assert nothing.schema == SPLIT_SCHEMA
    assert split_problems(nothing) == []
    rows = [image(index) for index in range(5)]
    assert assign_splits(table(rows), nothing, CONFIG).equals(assign_splits(table(rows), None, CONFIG))
    assert assign_splits(table([]), assign_splits(table(rows), None, CONFIG), CONFIG).num_rows == 0


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="more than once.*a/x0"):
        assign_splits(table([image(0), image(0)]), None, CONFIG)
    with pytest.raises(ValueError, match="no column lesion_id"):
        assign_splits(table([image(0)]).drop_columns("lesion_id"), None, CONFIG)
    previous = previously([image(0)], ["holdout"])
    with pytest.raises(ValueError, match="holdout"):
        assign_splits(table([image(0)]), previous, CONFIG)
    with pytest.raises(ValidationError, match=r"sum to 0\.9"):
        SplitConfig(train_fraction=0.5, val_fraction=0.1, test_fraction=0.3)


def test_official_test_images_stay_test_and_take_their_group_with_them():
    rng = np.random.default_rng()
    rows = some_images(rng, 300)
    for row in rows:
        row["official_split"] = str(rng.choice(list(Split))) if rng.random() < 0.2 else None
    splits = assign_splits(table(rows), None, CONFIG)
    sides = by_image(splits)
    assert split_problems(splits) == []
    official = {(row["source"], row["image_id"]): row["official_split"] for row in rows}
    for members in components(rows):
        named = {official[member] for member in members} - {None}
        if named:
            strictest = max(named, key=list(Split).index)
            assert {sides[member] for member in members} == {strictest}


def test_an_official_test_image_that_joins_a_training_lesion_takes_it_out_of_training():
    before = assign_splits(
        table([image(0, lesion_id="one")]), None, SplitConfig(train_fraction=1, val_fraction=0, test_fraction=0)
    )
    rows = table([image(0, lesion_id="one"), image(1, lesion_id="one", official_split="test")])
    splits = assign_splits(rows, before, CONFIG)
    assert by_image(splits) == {("a", "x0"): None, ("a", "x1"): "test"}
    assert "join" in splits["withheld_reason"][0].as_py()


def light_and_dark(rng: np.random.Generator, number: int) -> list[dict]:
    return [
        image(
            index,
            source_label=str(rng.choice(["psoriasis", "folliculitis"])),
            skin_type=int(rng.integers(1, 7)) if rng.random() < 0.9 else None,
            concepts=[("row", str(number - index))],
        )
        for index in range(number)
    ]


def test_the_light_dark_law_learns_from_light_skin_and_a_few_dark_images_and_tests_on_dark():
    rows = light_and_dark(np.random.default_rng(), 400)
    splits = light_dark_split(table(rows))
    assert split_problems(splits) == []
    counts = Counter()
    for row, found in zip(sorted(rows, key=lambda row: row["image_id"]), splits.to_pylist(), strict=True):
        tone = {1: "light", 2: "light", 5: "dark", 6: "dark"}.get(row["skin_type"])
        counts[row["source_label"], tone, found["split"]] += 1
        assert (found["split"] is None) == (tone is None) == (found["withheld_reason"] is not None)
    for label in ("psoriasis", "folliculitis"):
        assert counts[label, "dark", "train"] == counts[label, "light", "val"] == 8
        assert counts[label, "light", "test"] == counts[label, "dark", "val"] == 0
        assert counts[label, "dark", "test"] > 0


def test_the_light_dark_draw_is_pandas_own_in_the_order_of_the_table():
    rows = light_and_dark(np.random.default_rng(), 300)
    frame = pd.DataFrame(rows).sort_values("concepts", key=lambda column: column.map(lambda pairs: int(pairs[0][1])))
    dark = frame[frame.skin_type.isin([5, 6])]
    drawn = set(dark.groupby("source_label").sample(n=8, random_state=0).image_id)
    in_train = {
        image_id for (_, image_id), split in by_image(light_dark_split(table(rows))).items() if split == "train"
    }
    assert in_train & set(dark.image_id) == drawn


def test_the_light_dark_law_lets_no_duplicate_leak():
    rows = light_and_dark(np.random.default_rng(), 300)
    sides = by_image(light_dark_split(table(rows)))
    train, test = (next(key[1] for key, split in sides.items() if split == side) for side in ("train", "test"))
    for row in rows:
        if row["image_id"] in (train, test):
            row["sha256"] = "the same bytes"
    splits = light_dark_split(table(rows))
    assert split_problems(splits) == []
    assert by_image(splits)["a", train] is None
    assert by_image(splits)["a", test] == "test"


def test_too_few_images_of_a_tone_are_said_with_the_label():
    rows = [image(index, source_label="rare", skin_type=5) for index in range(3)]
    with pytest.raises(ValueError, match="'rare' has 3 images of dark skin; the light_dark split draws 8"):
        light_dark_split(table(rows))
