"""PAD-UFES-20's adapter, on a small folder in the publisher's layout."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.images import encode_png
from derm_pipeline.sources import scan
from derm_pipeline.sources.pad_ufes20 import PadUfes20

COLUMNS = (
    *("patient_id", "lesion_id", "smoke", "drink", "background_father", "background_mother", "age", "pesticide"),
    *("gender", "skin_cancer_history", "cancer_history", "has_piped_water", "has_sewage_system", "fitspatrick"),
    *("region", "diameter_1", "diameter_2", "diagnostic", "itch", "grew", "hurt", "changed", "bleed", "elevation"),
    *("img_id", "biopsed"),
)
PAD = PadUfes20()


def name(number: int) -> str:
    return f"PAT_{number}_{number + 100}_{number + 500}"


def row(number: int, **cells: str) -> dict[str, str]:
    usual = dict.fromkeys(COLUMNS, "") | {
        "patient_id": f"PAT_{number}",
        "lesion_id": str(number + 100),
        "age": "55",
        "gender": "FEMALE",
        "fitspatrick": "3.0",
        "region": "NECK",
        "diameter_1": "6.0",
        "diameter_2": "5.0",
        "diagnostic": "BCC",
        **dict.fromkeys(("itch", "grew", "bleed", "elevation", "biopsed"), "True"),
        **dict.fromkeys(("hurt", "changed"), "UNK"),
        "img_id": f"{name(number)}.png",
    }
    return usual | cells


def part(number: int) -> str:
    return f"images/imgs_part_{number % 3 + 1}"


def png() -> bytes:
    return encode_png(np.random.default_rng().integers(0, 256, (12, 16, 3), dtype=np.uint8))


def write_table(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write(folder: Path, rows: list[dict[str, str]], images: str | None = None) -> Path:
    for number in range(1, len(rows) + 1):
        subfolder = folder / (part(number) if images is None else images)
        subfolder.mkdir(parents=True, exist_ok=True)
        (subfolder / f"{name(number)}.png").write_bytes(png())
    write_table(folder, rows)
    return folder


def only_record(folder: Path, **cells: str) -> dict:
    (record,) = scan(PAD, write(folder, [row(1, **cells)])).records.to_pylist()
    return record | {"concepts": dict(record["concepts"])}


def reasons(folder: Path) -> dict[str | None, str]:
    return {line["image_id"]: line["reason"] for line in scan(PAD, folder).quarantined.to_pylist()}


def test_a_row_becomes_a_clinical_record(tmp_path):
    record = only_record(tmp_path)
    assert (record["image_id"], record["file"]) == (name(1), f"{part(1)}/{name(1)}.png")
    assert (record["modality"], record["diagnosis"], record["source_label"]) == ("clinical", "bcc", "BCC")
    assert (record["age_years"], record["sex"], record["site"], record["malignant"]) == (55, "female", "neck", True)
    assert (record["skin_type"], record["skin_type_origin"]) == (3, "labelled")
    assert (record["lesion_id"], record["patient_id"]) == ("101", "PAT_1")
    assert record["concepts"] == {
        "diameter_1": "6.0",
        "diameter_2": "5.0",
        **dict.fromkeys(("itch", "grew", "bleed", "elevation", "biopsed"), "True"),
    }


def test_all_images_of_all_three_parts_are_found(tmp_path):
    folder = write(tmp_path, [row(number) for number in range(1, 7)])
    PAD.prepare(folder)
    found = scan(PAD, folder)
    assert (found.records.num_rows, found.quarantined.num_rows) == (6, 0)
    assert {Path(file).parent.name for file in found.records["file"].to_pylist()} == {
        f"imgs_part_{n}" for n in (1, 2, 3)
    }


@pytest.mark.parametrize(
    ("word", "diagnosis", "malignant"),
    [
        *(("BCC", "bcc", True), ("SCC", "scc", True), ("MEL", "mel", True)),
        *(("ACK", "ak", False), ("SEK", "bkl", False), ("NEV", "nv", False)),
    ],
)
def test_the_six_labels_have_a_diagnosis_each(tmp_path, word, diagnosis, malignant):
    record = only_record(tmp_path, diagnostic=word)
    assert (record["diagnosis"], record["malignant"], record["source_label"]) == (diagnosis, malignant, word)


@pytest.mark.parametrize("scale", ["", "0", "0.0", "nan"])
def test_a_skin_type_of_zero_or_none_is_unknown(tmp_path, scale):
    record = only_record(tmp_path, fitspatrick=scale)
    assert (record["skin_type"], record["skin_tone"], record["skin_type_origin"]) == (None, None, None)


@pytest.mark.parametrize("age", ["", "nan", "0", "0.0"])
def test_an_age_of_zero_or_none_is_unknown(tmp_path, age):
    assert only_record(tmp_path, age=age)["age_years"] is None


@pytest.mark.parametrize(
    ("region", "site", "own"),
    [
        *(("NOSE", "face", "nose"), ("LIP", "face", "lip"), ("FOREARM", "upper extremity", "forearm")),
        *(("THIGH", "lower extremity", "thigh"), ("BACK", "back", None), ("EAR", "ear", None), ("", None, None)),
    ],
)
def test_a_region_that_is_narrower_than_the_site_is_kept_in_its_own_word(tmp_path, region, site, own):
    record = only_record(tmp_path, region=region)
    assert (record["site"], record["concepts"].get("site")) == (site, own)


def test_nan_in_every_column_gives_a_record_of_unknowns(tmp_path):
    record = only_record(tmp_path, **dict.fromkeys(set(COLUMNS) - {"img_id"}, "NaN"))
    assert record["source_label"] == ""
    unknown = ("diagnosis", "malignant", "age_years", "sex", "site", "skin_type", "lesion_id", "patient_id")
    assert [record[column] for column in unknown] == [None] * len(unknown)
    assert record["concepts"] == {}


def test_diameters_of_zero_say_nothing(tmp_path):
    assert not {"diameter_1", "diameter_2"} & set(only_record(tmp_path, diameter_1="0.0", diameter_2="0")["concepts"])


def test_what_cannot_be_read_or_found_is_named(tmp_path):
    bad = [{"diagnostic": "BOD"}, {"fitspatrick": "7.0"}, {"region": "TAIL"}, {"gender": "X"}, {"age": "-4"}]
    rows = [row(1), *(row(number, **cells) for number, cells in enumerate(bad, 2))]
    folder = write(tmp_path, rows)
    write_table(folder, [*rows, row(7), row(8, img_id="../metadata.png"), row(1)])
    found = scan(PAD, folder)
    assert found.records["image_id"].to_pylist() == [name(1)]
    assert found.quarantined.num_rows == 8
    for number, word in enumerate(("'BOD'", "'7.0'", "'TAIL'", "'X'", "'-4'"), 2):
        assert word in reasons(folder)[name(number)]
    assert reasons(folder)[name(7)] == "the file is missing on disk"
    assert "not a safe name" in reasons(folder)["../metadata"]
    assert "already in line 2" in reasons(folder)[name(1)]


def test_the_publishers_archives_are_unpacked_in_place(tmp_path):
    (tmp_path / "images").mkdir()
    for number in (1, 2, 3):
        with zipfile.ZipFile(tmp_path / f"{part(number)}.zip", "w") as archive:
            archive.writestr(f"imgs_part_{number % 3 + 1}/{name(number)}.png", png())
    write_table(tmp_path, [row(number) for number in (1, 2, 3)])
    PAD.prepare(tmp_path)
    assert scan(PAD, tmp_path).records.num_rows == 3


@pytest.mark.parametrize("images", [".", "images", "images/imgs_part_2", "images/imgs_part_2/imgs_part_2"])
def test_the_images_may_lie_in_several_places_and_the_fingerprint_covers_each(tmp_path, images):
    folder = write(tmp_path, [row(1), row(2)], images)
    assert scan(PAD, folder).records.num_rows == 2
    before = PAD.fingerprint(folder)
    (folder / images / "another.png").write_bytes(b"another")
    assert PAD.fingerprint(folder) != before


def test_a_file_name_in_another_case_is_found(tmp_path):
    folder = write(tmp_path, [row(1), row(2, img_id=f"{name(2)}.PNG")])
    path = folder / part(1) / f"{name(1)}.png"
    path.rename(path.with_name(f"{name(1).lower()}.PNG"))
    assert scan(PAD, folder).records["image_id"].to_pylist() == [name(1), name(2)]


def test_the_errors_say_where_is_looked_and_for_what(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder.*imgs_part_1"):
        PAD.prepare(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no metadata\.csv.*mendeley"):
        PAD.fingerprint(tmp_path)
    write_table(tmp_path, [row(1)])
    with pytest.raises(FileNotFoundError, match="no image file.*imgs_part_1"):
        PAD.prepare(tmp_path)
