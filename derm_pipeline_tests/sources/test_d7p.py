"""D7P's adapter, on a small folder in the publisher's layout."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from derm_pipeline.images import encode_jpeg
from derm_pipeline.records import Diagnosis, Site
from derm_pipeline.sources import scan
from derm_pipeline.sources.d7p import CONCEPTS, D7p
from derm_pipeline.sources.identity import archive_names

SOURCE = D7p()
NUM_CASES = 5
Cells = dict[str, str]


def jpeg() -> bytes:
    return encode_jpeg(np.random.default_rng().integers(0, 256, (9, 12, 3), dtype=np.uint8))


def case(number: int, **cells: str) -> Cells:
    usual = {
        "case_num": str(number + 1),
        "diagnosis": "clark nevus",
        "seven_point_score": "2",
        "pigment_network": "atypical",
        "streaks": "absent",
        "pigmentation": "diffuse irregular",
        "regression_structures": "blue areas",
        "dots_and_globules": "regular",
        "blue_whitish_veil": "present",
        "vascular_structures": "absent",
        "level_of_diagnostic_difficulty": "medium",
        "elevation": "palpable",
        "location": "back",
        "sex": "female",
        "management": "excision",
        "clinic": f"NEL/NEL{number:03d}.JPG",
        "derm": f"NEL/Nel{number + 500:03d}.jpg",
        "case_id": "",
        "notes": "",
    }
    return usual | cells


def write_table(folder: Path, rows: list[Cells], name: str = "meta/meta.csv") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_indexes(folder: Path, side: str, numbers: list[int | str]) -> None:
    (folder / "meta" / f"{side}_indexes.csv").write_text("indexes\n" + "".join(f"{number}\n" for number in numbers))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five cases; on disk the names are as in the table."""
    rows = [case(number) for number in range(NUM_CASES)]
    write_table(tmp_path, rows)
    for row in rows:
        for view in ("clinic", "derm"):
            path = tmp_path / "images" / row[view]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg())
    return tmp_path


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found = {line["image_id"]: line for line in scan(SOURCE, folder).records.to_pylist()}
    return {image: line | {"concepts": dict(line["concepts"])} for image, line in found.items()}


def reasons(folder: Path) -> dict[str | None, str]:
    return {line["image_id"]: line["reason"] for line in scan(SOURCE, folder).quarantined.to_pylist()}


def test_a_case_is_a_clinical_and_a_dermoscopic_image_of_one_lesion(folder):
    found = records(folder)
    assert len(found) == 2 * NUM_CASES
    assert reasons(folder) == {}
    clinical, dermoscopic = found["nel-nel002"], found["nel-nel502"]
    assert (clinical["modality"], dermoscopic["modality"]) == ("clinical", "dermoscopic")
    assert clinical["lesion_id"] == dermoscopic["lesion_id"] == "D7P_0003"
    assert clinical["file"] == "images/NEL/NEL002.JPG"
    own = {"image_id", "file", "sha256", "size_bytes", "modality"}
    shared = [{name: value for name, value in line.items() if name not in own} for line in (clinical, dermoscopic)]
    assert shared[0] == shared[1]
    assert (clinical["sex"], clinical["site"], clinical["age_years"]) == ("female", "back", None)


def test_the_seven_points_and_what_else_is_said_are_concepts_in_the_publishers_words(folder):
    (concepts,) = {tuple(sorted(line["concepts"].items())) for line in records(folder).values()}
    assert dict(concepts) == {name: case(0)[name] for name in CONCEPTS}
    assert dict(concepts)["streaks"] == "absent"
    write_table(folder, [case(number, **dict.fromkeys(CONCEPTS, "")) for number in range(NUM_CASES)])
    assert {tuple(line["concepts"]) for line in records(folder).values()} == {()}


@pytest.mark.parametrize(
    ("label", "diagnosis"),
    [
        ("basal cell carcinoma", Diagnosis.BCC),
        ("blue nevus", Diagnosis.NV),
        ("clark nevus", Diagnosis.NV),
        ("combined nevus", Diagnosis.NV),
        ("congenital nevus", Diagnosis.NV),
        ("dermal nevus", Diagnosis.NV),
        ("recurrent nevus", Diagnosis.NV),
        ("reed or spitz nevus", Diagnosis.NV),
        ("dermatofibroma", Diagnosis.DF),
        ("lentigo", None),
        ("melanosis", None),
        ("miscellaneous", None),
        ("melanoma", Diagnosis.MEL),
        ("melanoma (in situ)", Diagnosis.MEL),
        ("melanoma (less than 0.76 mm)", Diagnosis.MEL),
        ("melanoma (0.76 to 1.5 mm)", Diagnosis.MEL),
        ("melanoma (more than 1.5 mm)", Diagnosis.MEL),
        ("melanoma metastasis", Diagnosis.MEL),
        ("seborrheic keratosis", Diagnosis.BKL),
        ("vascular lesion", Diagnosis.VASC),
    ],
)
def test_a_label_is_mapped_and_kept(folder, label, diagnosis):
    write_table(folder, [case(number, diagnosis=label) for number in range(NUM_CASES)])
    candidates = SOURCE.list_images(folder).candidates
    assert {(line.source_label, line.diagnosis) for line in candidates} == {(label, diagnosis)}


@pytest.mark.parametrize(
    ("word", "site"),
    [
        ("upper limbs", Site.UPPER_EXTREMITY),
        ("lower limbs", Site.LOWER_EXTREMITY),
        ("head neck", Site.HEAD_OR_NECK),
        ("genital areas", Site.GENITAL),
        ("acral", Site.ACRAL),
        ("buttocks", Site.BUTTOCKS),
        ("abdomen", Site.ABDOMEN),
        ("chest", Site.CHEST),
        ("back", Site.BACK),
    ],
)
def test_the_publishers_word_for_a_site_is_kept_where_it_is_not_the_sites_own(folder, word, site):
    write_table(folder, [case(number, location=word) for number in range(NUM_CASES)])
    for line in SOURCE.list_images(folder).candidates:
        assert line.site is site
        assert line.concepts.get("site") == (None if word == site.value else word)


def test_letter_case_and_suffix_case_may_differ_between_table_and_disk(folder):
    for path in list((folder / "images" / "NEL").iterdir()):
        path.rename(path.with_name("_" + path.name))
    for path in list((folder / "images" / "NEL").iterdir()):
        path.rename(path.with_name(path.name[1:].swapcase()))
    (folder / "images" / "NEL").rename(folder / "images" / "nel")
    found = records(folder)
    assert len(found) == 2 * NUM_CASES
    assert found["nel-nel000"]["file"] == "images/nel/nel000.jpg"
    assert reasons(folder) == {}


def test_same_names_in_two_subfolders_are_two_images(folder):
    other = case(NUM_CASES, clinic="FAL/NEL000.JPG", derm="FAL/Nel500.jpg")
    write_table(folder, [*(case(number) for number in range(NUM_CASES)), other])
    (folder / "images" / "FAL").mkdir()
    for view in ("clinic", "derm"):
        (folder / "images" / other[view]).write_bytes(jpeg())
    found = records(folder)
    assert len(found) == 2 * NUM_CASES + 2
    assert found["fal-nel000"]["lesion_id"] != found["nel-nel000"]["lesion_id"]


def test_an_image_that_two_cases_name_is_kept_with_the_first(folder):
    rows = [case(number) for number in range(NUM_CASES)]
    rows[3]["clinic"] = rows[1]["clinic"].lower()
    write_table(folder, rows)
    found = scan(SOURCE, folder)
    assert dict(zip(*(found.records[name].to_pylist() for name in ("image_id", "lesion_id")), strict=True))[
        "nel-nel001"
    ] == ("D7P_0002")
    quarantined = {line["image_id"]: line["reason"] for line in found.quarantined.to_pylist()}
    assert "already in line 3" in quarantined["nel-nel001"]
    assert "not in the table" in quarantined["nel-nel003"]


def test_two_files_that_differ_in_letter_case_only_are_not_guessed(folder):
    (folder / "images" / "NEL" / "nel000.jpg").write_bytes(jpeg())
    found = scan(SOURCE, folder)
    assert found.records.num_rows == 2 * NUM_CASES - 1
    assert {line["file"] for line in found.quarantined.to_pylist()} == {
        "images/NEL/NEL000.JPG",
        "images/NEL/nel000.jpg",
    }
    assert all("several files" in line["reason"] for line in found.quarantined.to_pylist())


def test_without_a_case_number_the_lesion_is_the_rows_place(folder):
    rows = [case(number) for number in range(NUM_CASES)]
    for row in rows:
        del row["case_num"]
    write_table(folder, rows)
    lesions = [line.lesion_id for line in SOURCE.list_images(folder).candidates]
    assert lesions[::2] == lesions[1::2] == [f"D7P_{number:04d}" for number in range(1, NUM_CASES + 1)]


@pytest.mark.parametrize("number", ["", "nan"])
def test_cases_without_a_number_do_not_share_a_lesion(folder, number):
    rows = [case(place, case_num=number if place < 3 else str(place)) for place in range(NUM_CASES)]
    write_table(folder, rows)
    assert len({line.lesion_id for line in SOURCE.list_images(folder).candidates}) == NUM_CASES


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd.jpg", "/etc/passwd.jpg", "NEL/../../x.jpg", "..\\x.jpg", ".hidden.jpg", "x" * 121, "ü.jpg"],
)
def test_a_path_that_is_not_below_images_is_quarantined(folder, path):
    rows = [case(number) for number in range(NUM_CASES)]
    write_table(folder, [rows[0] | {"clinic": path}, *rows[1:]])
    found = reasons(folder)
    assert found.keys() == {"D7P_0001-clinic", "nel-nel000"}
    assert any(word in found["D7P_0001-clinic"] for word in ("not a path below images/", "not a safe name"))
    assert "table line 2" in found["D7P_0001-clinic"]
    assert "not in the table" in found["nel-nel000"]
    assert len(records(folder)) == 2 * NUM_CASES - 1


def test_a_case_without_one_of_its_images_keeps_the_other(folder):
    rows = [case(number) for number in range(NUM_CASES)]
    rows[0]["clinic"] = ""
    rows[1]["derm"] = "NEL/Nel999.jpg"
    write_table(folder, rows)
    found = reasons(folder)
    assert "names no image in the column clinic" in found["D7P_0001-clinic"]
    assert "missing on disk" in found["nel-nel999"]
    assert len(records(folder)) == 2 * NUM_CASES - 2


@pytest.mark.parametrize(
    ("cells", "word"),
    [
        ({"diagnosis": "wart"}, "diagnosis 'wart'"),
        ({"location": "left knee"}, "location 'left knee'"),
        ({"sex": "x"}, "sex 'x'"),
    ],
)
def test_a_word_outside_the_vocabulary_quarantines_both_images(folder, cells, word):
    rows = [case(number) for number in range(NUM_CASES)]
    write_table(folder, [rows[0] | cells, *rows[1:]])
    found = reasons(folder)
    assert found.keys() == {"nel-nel000", "nel-nel500"}
    assert all(word in reason and "allowed" in reason for reason in found.values())


def test_a_row_with_the_wrong_number_of_cells_quarantines_both_images(folder):
    path = folder / "meta" / "meta.csv"
    lines = path.read_text().splitlines()
    lines[1] += ",surplus"
    path.write_text("\n".join(lines))
    found = scan(SOURCE, folder).quarantined.to_pylist()
    assert {line["file"] for line in found} == {"images/NEL/NEL000.JPG", "images/NEL/Nel500.jpg"}
    assert all("the row has 20 cells; the table has 19 columns" in line["reason"] for line in found)


def test_the_official_sides_are_those_of_the_index_files(folder):
    assert {line["official_split"] for line in records(folder).values()} == {None}
    write_indexes(folder, "train", [4, 0])
    write_indexes(folder, "valid", [1])
    write_indexes(folder, "test", [3])
    sides = {line["lesion_id"]: set() for line in records(folder).values()}
    for line in records(folder).values():
        sides[line["lesion_id"]].add(line["official_split"])
    assert sides == {
        "D7P_0001": {"train"},
        "D7P_0002": {"val"},
        "D7P_0003": {None},
        "D7P_0004": {"test"},
        "D7P_0005": {"train"},
    }


def test_an_index_file_written_by_pandas_with_its_index_is_read(folder):
    (folder / "meta" / "test_indexes.csv").write_text(",indexes\n0,2\n1,4\n")
    found = {line["lesion_id"] for line in records(folder).values() if line["official_split"] == "test"}
    assert found == {"D7P_0003", "D7P_0005"}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([1], r"valid_indexes\.csv, line 2: index 1 is already in meta/train_indexes\.csv"),
        ([2, 2], r"valid_indexes\.csv, line 3: index 2 is already in meta/valid_indexes\.csv"),
        ([2, NUM_CASES], r"valid_indexes\.csv, line 3: index 5 is out of range; meta/meta\.csv has 5 rows"),
        ([-1], r"valid_indexes\.csv, line 2: '-1' is no row number"),
        (["1.5"], r"valid_indexes\.csv, line 2: '1\.5' is no row number"),
    ],
)
def test_an_index_on_two_sides_or_out_of_range_is_an_error_that_names_it(folder, numbers, words):
    write_indexes(folder, "train", [0, 1])
    write_indexes(folder, "valid", numbers)
    for look in (SOURCE.list_images, SOURCE.prepare):
        with pytest.raises(ValueError, match=words):
            look(folder)


@pytest.mark.parametrize("where", ["meta.csv", "release_v0"])
def test_the_table_may_lie_beside_the_images_or_all_in_the_release(folder, where):
    write_indexes(folder, "test", [0])
    expected = records(folder).keys()
    if where == "meta.csv":
        (folder / "meta" / "meta.csv").rename(folder / "meta.csv")
    else:
        (folder / "release_v0").mkdir()
        for name in ("meta", "images"):
            (folder / name).rename(folder / "release_v0" / name)
    SOURCE.prepare(folder)
    found = records(folder)
    assert found.keys() == expected
    assert found["nel-nel000"]["official_split"] == "test"


def test_the_release_may_be_zipped(folder, tmp_path_factory):
    zipped = tmp_path_factory.mktemp("zipped")
    with zipfile.ZipFile(zipped / "release_v0.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, Path("release_v0", path.relative_to(folder)))
    SOURCE.prepare(zipped)
    assert records(zipped).keys() == records(folder).keys()


def test_the_fingerprint_changes_with_every_table_and_image_and_only_then(folder):
    seen = [SOURCE.fingerprint(folder)]
    (folder / "readme.txt").write_text("no part of the source")
    assert SOURCE.fingerprint(folder) == seen[0]
    for side in ("train", "valid", "test"):
        write_indexes(folder, side, [])
        seen.append(SOURCE.fingerprint(folder))
    for path in (folder / "meta" / "meta.csv", folder / "images" / "NEL" / "Nel500.jpg"):
        path.write_bytes(path.read_bytes() + b"\n")
        seen.append(SOURCE.fingerprint(folder))
    (folder / "images" / "FAL").mkdir()
    (folder / "images" / "FAL" / "Fal001.jpg").write_bytes(jpeg())
    seen.append(SOURCE.fingerprint(folder))
    assert len(set(seen)) == len(seen)
    assert "not in the table" in reasons(folder)["fal-fal001"]


def test_a_missing_folder_table_or_image_says_what_is_expected(folder, tmp_path_factory):
    SOURCE.prepare(folder)
    for look in (SOURCE.prepare, SOURCE.list_images, SOURCE.fingerprint):
        with pytest.raises(FileNotFoundError, match=r"derm7pt.* is looked for in .*nowhere.*meta/meta\.csv.*on appli"):
            look(folder / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"no meta/meta\.csv in .*Expected there"):
            look(tmp_path_factory.mktemp("empty"))
    for path in (folder / "images" / "NEL").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no image file in"):
        SOURCE.prepare(folder)


def test_a_table_without_a_criterion_is_an_error_that_names_it(folder):
    rows = [case(number) for number in range(NUM_CASES)]
    for row in rows:
        del row["streaks"]
    write_table(folder, rows)
    with pytest.raises(ValueError, match=r"meta\.csv has no column 'streaks'; columns found: case_num, diagnosis"):
        SOURCE.list_images(folder)


def test_no_name_of_d7p_looks_like_the_isic_archives(folder):
    found = scan(SOURCE, folder).records
    for column in ("image_id", "lesion_id"):
        assert archive_names(found[column]).null_count == 2 * NUM_CASES


def test_the_downloaded_archive_may_stay_beside_what_was_unpacked_from_it(folder):
    with zipfile.ZipFile(folder / "release_v0.zip", "w") as archive:
        for path in folder.glob("*/**/*.*"):
            archive.write(path, Path("release_v0", path.relative_to(folder)))
    SOURCE.prepare(folder)
    assert not (folder / "release_v0").exists()
    assert len(records(folder)) == 2 * NUM_CASES


def test_the_release_has_a_fingerprint_before_it_is_unpacked(folder, tmp_path_factory):
    zipped = tmp_path_factory.mktemp("zipped")
    with zipfile.ZipFile(zipped / "release_v0.zip", "w") as archive:
        archive.write(folder / "meta" / "meta.csv", "release_v0/meta/meta.csv")
    assert SOURCE.fingerprint(zipped) == SOURCE.fingerprint(zipped)
    with pytest.raises(FileNotFoundError, match=r"release_v0.zip lies there and is unpacked when first used"):
        SOURCE.list_images(zipped)


def test_a_missing_label_is_none(folder):
    write_table(folder, [case(0, diagnosis="NaN")])
    found = records(folder)["nel-nel000"]
    assert (found["source_label"], found["diagnosis"], found["malignant"]) == ("", None, None)
