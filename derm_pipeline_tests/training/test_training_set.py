"""What a generator may see: the train split, each image once, nothing of a held-out lesion, patient or duplicate."""

import random
from collections import Counter

import pyarrow as pa
import pytest

from derm_pipeline.records import Diagnosis, Split
from derm_pipeline.training.training_set import (
    TrainingSetConfig,
    diagnosis_counts,
    select_rows,
    training_set_problems,
    with_captions,
)


def some_rows(num=200):
    """Records and splits of two sources whose image ids are partly the same, in different orders."""
    rows = [
        {
            "source": random.choice(["a", "b"]),
            "image_id": f"i{number // 2}_{number % 2}",
            "sha256": f"{number:064x}",
            "lesion_id": f"l{number // 4}" if number % 5 else None,
            "patient_id": None,
            "diagnosis": random.choice(list(Diagnosis)).value,
            "duplicate_of": None,
            "text": None,
        }
        for number in range(num)
    ]
    splits = [row | {"split": random.choice([*(split.value for split in Split), None])} for row in rows]
    random.shuffle(splits)
    schema = pa.schema([pa.field(name, pa.string()) for name in rows[0]])
    of_splits = schema.append(pa.field("split", pa.string()))
    return pa.Table.from_pylist(rows, schema), pa.Table.from_pylist(splits, of_splits)


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))


def identities(table):
    return list(zip(table["source"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def test_every_split_gets_its_own_rows_in_order():
    records, splits = some_rows()
    wanted = {(row["source"], row["image_id"]): row["split"] for row in splits.to_pylist()}
    for split in Split:
        found = select_rows(records, splits, split).rows
        assert identities(found) == sorted(key for key, value in wanted.items() if value == split.value)
        assert found.schema == records.schema


def test_a_second_record_of_the_same_bytes_is_left_out():
    records, splits = some_rows()
    splits = with_column(splits, "split", ["train"] * splits.num_rows)
    marks = [None, *random.choices([None, "i0_0"], k=records.num_rows - 1)]
    records = with_column(records, "duplicate_of", marks)
    found = select_rows(records, splits, Split.TRAIN)
    assert found.rows.num_rows == marks.count(None)
    assert found.left_out["double"] == found.joined["digest"] == len(marks) - marks.count(None)


def test_diagnoses_with_too_few_images_are_left_out_by_name_and_doubles_do_not_help_them():
    records, splits = some_rows()
    splits = with_column(splits, "split", ["train"] * splits.num_rows)
    records = with_column(records, "diagnosis", ["mel"] * 3 + ["df"] * 6 + ["nv"] * (records.num_rows - 9))
    records = with_column(records, "duplicate_of", [None] * 6 + ["x"] * 3 + [None] * (records.num_rows - 9))
    found = select_rows(records, splits, Split.TRAIN, TrainingSetConfig(min_images=4))
    assert set(found.rows["diagnosis"].to_pylist()) == {"nv"}
    assert found.rare == {"df": 3, "mel": 3}
    assert found.left_out["rare diagnosis"] == 6
    every = select_rows(records, splits, Split.TRAIN, TrainingSetConfig(min_images=3))
    assert every.rare == {}
    assert every.rows.num_rows == records.num_rows - 3
    assert "rare diagnosis" not in every.left_out


def joined_rows(**second):
    """An image of source a and one of source b, both in train."""
    first = {"source": "a", "image_id": "ISIC_0000091", "sha256": "1" * 64, "diagnosis": "nv"}
    other = {"source": "b", "image_id": "x", "sha256": "2" * 64, "diagnosis": "nv"} | second
    schema = pa.schema([pa.field(n, pa.string()) for n in (*first, "lesion_id", "patient_id", "duplicate_of")])
    rows = pa.Table.from_pylist([first, other], schema)
    return rows, rows.append_column("split", pa.array(["train", "train"]))


def test_an_image_that_two_sources_hold_is_used_once_and_counted():
    apart = select_rows(*joined_rows(), Split.TRAIN)
    assert apart.rows.num_rows == 2
    assert apart.joined == {"archive_id": 0, "digest": 0, "other_diagnosis": 0}
    by_id = select_rows(*joined_rows(image_id="ISIC_0000091_downsampled", diagnosis="scc"), Split.TRAIN)
    assert identities(by_id.rows) == [("a", "ISIC_0000091")]
    assert by_id.joined == {"archive_id": 1, "digest": 0, "other_diagnosis": 1}
    by_bytes = select_rows(*joined_rows(sha256="1" * 64), Split.TRAIN)
    assert identities(by_bytes.rows) == [("a", "ISIC_0000091")]
    assert by_bytes.joined == {"archive_id": 0, "digest": 1, "other_diagnosis": 0}


def test_the_source_that_the_recipe_names_first_gives_the_image():
    records, splits = joined_rows(sha256="1" * 64)
    assert identities(select_rows(records.take([1, 0]), splits, Split.TRAIN).rows) == [("b", "x")]


def test_images_without_a_diagnosis_or_with_another_are_left_out_and_counted():
    records, splits = some_rows()
    splits = with_column(splits, "split", ["train"] * splits.num_rows)
    diagnoses = random.choices([None, "mel", "nv", "psoriasis"], k=records.num_rows)
    records = with_column(records, "diagnosis", diagnoses)
    everything = select_rows(records, splits, Split.TRAIN)
    assert everything.left_out == {"no diagnosis": diagnoses.count(None), "another diagnosis": 0, "double": 0}
    config = TrainingSetConfig(diagnoses=("mel", "psoriasis"))
    some = select_rows(records, splits, Split.TRAIN, config)
    assert some.rows.num_rows == diagnoses.count("mel") + diagnoses.count("psoriasis")
    assert some.left_out["another diagnosis"] == diagnoses.count("nv")


def test_captions_go_with_their_own_image():
    records, splits = some_rows()
    captions = [{"source": s, "image_id": i, "text": f"caption of {s}/{i}"} for s, i in identities(records)]
    random.shuffle(captions)
    found = with_captions(select_rows(records, splits, Split.TRAIN).rows, pa.Table.from_pylist(captions))
    assert found.num_rows > 0
    assert found["text"].to_pylist() == [f"caption of {s}/{i}" for s, i in identities(found)]


def test_an_image_without_a_caption_is_named():
    records, splits = some_rows()
    first = identities(select_rows(records, splits, Split.TRAIN).rows)[0]
    captions = [{"source": s, "image_id": i, "text": "x"} for s, i in identities(records) if (s, i) != first]
    with pytest.raises(ValueError, match=f"1 images have no caption .first: {'/'.join(first)}"):
        with_captions(select_rows(records, splits, Split.TRAIN).rows, pa.Table.from_pylist(captions))


def test_no_image_at_all_is_an_error():
    records, splits = some_rows(3)
    held_out = with_column(splits, "split", ["test"] * 3)
    with pytest.raises(ValueError, match="train split"):
        with_captions(
            select_rows(records, held_out, Split.TRAIN).rows, pa.table({"source": [], "image_id": [], "text": []})
        )


def leak(seen_id="i1", **held_out):
    schema = pa.schema([pa.field(n, pa.string()) for n in ("source", "image_id", "sha256", "lesion_id", "patient_id")])
    seen = {"source": "a", "image_id": seen_id, "sha256": "f" * 64, "lesion_id": "l1", "patient_id": None}
    other = {"source": "a", "image_id": "i2", "sha256": "e" * 64, "lesion_id": "l2", "patient_id": None} | held_out
    splits = pa.Table.from_pylist([seen, {name: other[name] for name in seen}], schema)
    splits = splits.append_column("split", pa.array(["train", other.get("split", "test")], pa.string()))
    return training_set_problems(pa.Table.from_pylist([seen], schema), splits)


def test_every_kind_of_leak_is_named_and_nothing_else():
    assert leak() == []  # two unknown patients are not one
    assert leak(lesion_id="l1") == ["lesion_id a/l1 is in the training set and held out"]
    assert leak(lesion_id="l1", split="val") == leak(lesion_id="l1")
    assert leak(lesion_id="l1", split="train") == leak(lesion_id="l1", split=None) == []
    assert leak(lesion_id="l1", source="b") == []  # another source's lesion of the same name
    archived = leak(image_id="ISIC_0000091_downsampled", source="b", seen_id="ISIC_0000091")
    assert archived == ["image_id ISIC_0000091 is in the training set and held out"]
    assert leak(sha256="f" * 64, source="b") == [f"sha256 {'f' * 64} is in the training set and held out"]


def test_diagnoses_are_counted_in_the_canonical_order():
    records, _ = some_rows(20)
    counts = diagnosis_counts(records)
    assert list(counts) == sorted(counts, key=list(Diagnosis).index)
    assert counts == Counter(records["diagnosis"].to_pylist())
