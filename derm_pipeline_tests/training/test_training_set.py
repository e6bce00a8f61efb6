"""What a generator may see: the train split, each image once, nothing of a held-out lesion, patient or duplicate."""

import random
from collections import Counter

import pyarrow as pa
import pytest

from derm_pipeline.records import Diagnosis, Split
from derm_pipeline.training.training_set import (
    diagnosis_counts,
    select_training_set,
    split_rows,
    training_set_problems,
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
        found = split_rows(records, splits, split)
        assert identities(found) == sorted(key for key, value in wanted.items() if value == split.value)
        assert found.schema == records.schema


def test_a_second_record_of_the_same_bytes_is_left_out():
    records, splits = some_rows()
    splits = with_column(splits, "split", ["train"] * splits.num_rows)
    marks = [None, *random.choices([None, "i0_0"], k=records.num_rows - 1)]
    records = with_column(records, "duplicate_of", marks)
    assert split_rows(records, splits, Split.TRAIN).num_rows == marks.count(None)


def test_captions_go_with_their_own_image():
    records, splits = some_rows()
    captions = [{"source": s, "image_id": i, "text": f"caption of {s}/{i}"} for s, i in identities(records)]
    random.shuffle(captions)
    found = select_training_set(records, splits, pa.Table.from_pylist(captions))
    assert found.num_rows > 0
    assert found["text"].to_pylist() == [f"caption of {s}/{i}" for s, i in identities(found)]


def test_an_image_without_a_caption_is_named():
    records, splits = some_rows()
    first = identities(split_rows(records, splits, Split.TRAIN))[0]
    captions = [{"source": s, "image_id": i, "text": "x"} for s, i in identities(records) if (s, i) != first]
    with pytest.raises(ValueError, match=f"1 images have no caption .first: {'/'.join(first)}"):
        select_training_set(records, splits, pa.Table.from_pylist(captions))


def test_no_image_at_all_is_an_error():
    records, splits = some_rows(3)
    held_out = with_column(splits, "split", ["test"] * 3)
    with pytest.raises(ValueError, match="train split"):
        select_training_set(records, held_out, pa.table({"source": [], "image_id": [], "text": []}))


def leak(**held_out):
    schema = pa.schema([pa.field(n, pa.string()) for n in ("source", "image_id", "sha256", "lesion_id", "patient_id")])
    seen = {"source": "a", "image_id": "i1", "sha256": "f" * 64, "lesion_id": "l1", "patient_id": None}
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
    assert leak(sha256="f" * 64, source="b") == [f"sha256 {'f' * 64} is in the training set and held out"]


def test_diagnoses_are_counted_with_those_that_do_not_occur():
    records, _ = some_rows(20)
    counts = diagnosis_counts(records)
    assert list(counts) == [diagnosis.value for diagnosis in Diagnosis]
    assert {name: count for name, count in counts.items() if count} == Counter(records["diagnosis"].to_pylist())
