"""Fitzpatrick17k's adapter and Fitz_subset's, on small folders in the publishers' layouts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.images import encode_jpeg
from derm_pipeline.records import Diagnosis
from derm_pipeline.sources import scan
from derm_pipeline.sources.conditions import CONDITIONS, condition_word, diagnoses_of, find_diagnosis
from derm_pipeline.sources.fitzpatrick17k import Fitzpatrick17k, FitzSubset

COLUMNS = (
    *("md5hash", "fitzpatrick_scale", "fitzpatrick_centaur", "label", "nine_partition_label"),
    *("three_partition_label", "qc", "url", "url_alphanum"),
)
FITZ = Fitzpatrick17k()
SUBSET = FitzSubset()


def md5(number: int) -> str:
    return f"{number:032x}"


def row(number: int, **cells: str) -> dict[str, str]:
    address = f"https://atlas.example/{number}.jpg"
    values = (md5(number), "3", "4", "psoriasis", "inflammatory", "non-neoplastic", "", address, f"atlas{number}.jpg")
    return dict(zip(COLUMNS, values, strict=True)) | cells


def write(folder: Path, rows: list[dict[str, str]], table: str = "fitzpatrick17k.csv", images: str = "images") -> Path:
    rng = np.random.default_rng()
    (folder / images).mkdir(parents=True, exist_ok=True)
    for cells in rows:
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        (folder / images / f"{cells['md5hash']}.jpg").write_bytes(encode_jpeg(pixels))
    with (folder / table).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def only_record(folder: Path, **cells: str) -> dict:
    (record,) = scan(FITZ, write(folder, [row(1, **cells)])).records.to_pylist()
    return record | {"concepts": dict(record["concepts"])}


def reasons(folder: Path, source: Fitzpatrick17k = FITZ) -> dict[str | None, str]:
    return {line["image_id"]: line["reason"] for line in scan(source, folder).quarantined.to_pylist()}


def test_a_row_becomes_a_clinical_record_with_both_annotators(tmp_path):
    record = only_record(tmp_path, label="basal cell carcinoma", three_partition_label="malignant", qc="1 Diagnostic")
    assert (record["source"], record["image_id"], record["file"]) == ("fitzpatrick17k", md5(1), f"images/{md5(1)}.jpg")
    assert (record["modality"], record["diagnosis"], record["malignant"]) == ("clinical", "bcc", True)
    assert (record["skin_type"], record["skin_tone"], record["skin_type_origin"]) == (3, "medium", "labelled")
    assert record["concepts"] == {
        "fitzpatrick_centaur": "4",
        "nine_partition_label": "inflammatory",
        "three_partition_label": "malignant",
        "qc": "1 Diagnostic",
        "url": "https://atlas.example/1.jpg",
        "row": "0",
    }


@pytest.mark.parametrize("scale", ["-1", "-1.0", "", "nan"])
def test_a_skin_type_of_minus_one_is_unknown_and_the_other_annotators_is_no_replacement(tmp_path, scale):
    record = only_record(tmp_path, fitzpatrick_scale=scale, fitzpatrick_centaur="2")
    assert (record["skin_type"], record["skin_tone"], record["skin_type_origin"]) == (None, None, None)
    assert record["concepts"]["fitzpatrick_centaur"] == "2"
    assert record["concepts"].get("fitzpatrick_scale") == (scale if "1" in scale else None)


def test_types_that_have_been_through_pandas_read_as_the_same_types(tmp_path):
    assert only_record(tmp_path, fitzpatrick_scale="6.0")["skin_type"] == 6


@pytest.mark.parametrize(
    ("partition", "malignant"), [("malignant", True), ("benign", False), ("non-neoplastic", False)]
)
def test_malignancy_is_the_publishers_partition(tmp_path, partition, malignant):
    assert only_record(tmp_path, label="actinic keratosis", three_partition_label=partition)["malignant"] is malignant


def test_nothing_is_learnt_from_an_image_that_the_publisher_found_wrongly_labelled(tmp_path):
    record = only_record(tmp_path, label="melanoma", three_partition_label="malignant", qc="3 Wrongly labelled")
    assert (record["diagnosis"], record["malignant"], record["source_label"]) == (None, None, "melanoma")
    assert record["concepts"]["qc"] == "3 Wrongly labelled"


def test_a_label_without_a_place_is_kept_without_a_diagnosis(tmp_path):
    record = only_record(tmp_path, label="photodermatoses")
    assert (record["diagnosis"], record["source_label"], record["malignant"]) == (None, "photodermatoses", False)


def test_a_missing_image_is_named_and_not_passed_over(tmp_path):
    folder = write(tmp_path, [row(1), row(2)])
    (folder / "images" / f"{md5(2)}.jpg").unlink()
    assert reasons(folder) == {md5(2): "the file is missing on disk"}


def test_words_outside_the_vocabulary_are_quarantined_and_named(tmp_path):
    bad = {2: {"label": "psoriassis"}, 3: {"fitzpatrick_scale": "7"}, 4: {"three_partition_label": "worse"}}
    found = reasons(write(tmp_path, [row(1), *(row(number, **cells) for number, cells in bad.items())]))
    assert len(found) == 3
    assert "'psoriassis' is none of the 114" in found[md5(2)]
    assert "fitzpatrick_scale '7'" in found[md5(3)]
    assert "three_partition_label 'worse'" in found[md5(4)]


def test_a_hash_that_is_a_path_never_leaves_the_folder(tmp_path):
    folder = write(tmp_path, [row(1)])
    text = (folder / FITZ.layout.tables[0][0]).read_text()
    (folder / "fitzpatrick17k.csv").write_text(text + text.splitlines()[1].replace(md5(1), "../../secret") + "\n")
    assert "not a safe name" in reasons(folder)["../../secret"]


def test_nan_in_every_column_gives_a_record_of_unknowns(tmp_path):
    record = only_record(tmp_path, **dict.fromkeys(COLUMNS[1:], "NaN"))
    assert (record["source_label"], record["diagnosis"], record["malignant"], record["skin_type"]) == ("",) + 3 * (
        None,
    )
    assert record["concepts"] == {"row": "0"}


@pytest.mark.parametrize("images", [".", "images", "data"])
def test_the_images_may_lie_beside_the_table_in_images_or_in_data(tmp_path, images):
    folder = write(tmp_path, [row(1), row(2)], images=images)
    FITZ.prepare(folder)
    assert scan(FITZ, folder).records.num_rows == 2


@pytest.mark.parametrize("images", [".", "images", "data"])
def test_the_fingerprint_covers_the_table_and_every_image_folder(tmp_path, images):
    folder = write(tmp_path, [row(1)])
    before = FITZ.fingerprint(folder)
    (folder / images).mkdir(exist_ok=True)
    (folder / images / f"{md5(9)}.jpg").write_bytes(b"another")
    between = FITZ.fingerprint(folder)
    write(folder, [row(1, label="acne")])
    assert len({before, between, FITZ.fingerprint(folder)}) == 3


def test_the_errors_say_where_is_looked_and_for_what(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a folder.*fitzpatrick17k\.csv"):
        FITZ.prepare(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no fitzpatrick17k\.csv in"):
        FITZ.prepare(tmp_path)
    folder = write(tmp_path, [row(1)])
    (folder / "images" / f"{md5(1)}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image file.*<md5hash>\.jpg"):
        FITZ.prepare(folder)


def test_fitz_subset_has_an_index_column_first_and_records_in_the_tables_order(tmp_path):
    numbers = [5, 3, 8]
    rows = [{"": str(7 * number)} | row(number, label="neutrophilic dermatoses") for number in numbers]
    records = scan(SUBSET, write(tmp_path, rows, "Fitz_subset.csv")).records.to_pylist()
    assert {record["source"] for record in records} == {"fitz_subset"}
    assert {record["diagnosis"] for record in records} == {"neutrophilic_dermatosis"}
    in_order = sorted(records, key=lambda record: int(dict(record["concepts"])["row"]))
    assert [record["image_id"] for record in in_order] == [md5(number) for number in numbers]


def test_the_seven_labels_of_fitz_subset_all_have_a_diagnosis():
    assert set(SUBSET.diagnoses.values()) == {
        *(Diagnosis.BCC, Diagnosis.FOLLICULITIS, Diagnosis.NEMATODE_INFECTION, Diagnosis.NEUTROPHILIC_DERMATOSIS),
        *(Diagnosis.PRURIGO_NODULARIS, Diagnosis.PSORIASIS, Diagnosis.SCC),
    }
    assert len(SUBSET.diagnoses) == 7


def test_fitz_subset_without_images_says_how_to_get_them_and_refuses_links_that_leave_the_folder(tmp_path):
    subset, whole = tmp_path / "fitz_subset", tmp_path / "fitzpatrick17k"
    write(subset, [row(1), row(2)], "Fitz_subset.csv")
    write(whole, [row(1), row(2)])
    for file in (subset / "images").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="cp --link"):
        SUBSET.prepare(subset)
    (subset / "images" / f"{md5(1)}.jpg").hardlink_to(whole / "images" / f"{md5(1)}.jpg")
    (subset / "images" / f"{md5(2)}.jpg").symlink_to(whole / "images" / f"{md5(2)}.jpg")
    assert scan(SUBSET, subset).records["image_id"].to_pylist() == [md5(1)]
    assert reasons(subset, SUBSET) == {md5(2): "the path leaves the source's folder"}


def test_only_labels_of_the_seven_are_in_fitz_subset(tmp_path):
    folder = write(tmp_path, [row(1), row(2, label="acne")], "Fitz_subset.csv")
    assert "'acne' is none of the 7" in reasons(folder, SUBSET)[md5(2)]


@pytest.mark.parametrize(
    "label",
    [
        *("urticaria pigmentosa", "porokeratosis actinic", "disseminated actinic porokeratosis", "epidermal nevus"),
        *("acquired autoimmune bullous diseaseherpes gestationis", "stasis edema", "drug induced pigmentary changes"),
        *("becker nevus", "naevus comedonicus", "nevus sebaceous of jadassohn", "tick bite", "neurodermatitis"),
    ],
)
def test_a_condition_that_only_sounds_like_a_diagnosis_has_none(label):
    assert FITZ.diagnoses[label] is None


def test_every_word_of_the_shared_table_is_in_its_own_form_and_diagnoses_are_found_through_case_and_dashes():
    assert all(condition_word(word) == word for word in CONDITIONS)
    assert find_diagnosis("Post-Inflammatory  hyperpigmentation") is None
    assert find_diagnosis("Melanoma-In-Situ") is Diagnosis.MEL
    with pytest.raises(KeyError):
        diagnoses_of(["a label on which nobody decided"])
