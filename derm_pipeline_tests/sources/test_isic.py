"""The adapters of the ISIC challenges, on small folders in the publisher's layout."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from derm_pipeline.images import encode_jpeg
from derm_pipeline.records import Site
from derm_pipeline.sources import scan
from derm_pipeline.sources.identity import archive_names
from derm_pipeline.sources.isic import Isic2018Test, Isic2019, Isic2020

Cells = dict[str, str]
TRUTH_2018, METADATA_2018 = "ISIC2018_Task3_Test_GroundTruth.csv", "ISIC_2019_Test_Metadata.csv"
TRUTH_2019, METADATA_2019 = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"
DUPLICATES_2020 = "ISIC_2020_Training_Duplicates.csv"
LABELS_2018 = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
LABELS_2019 = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def jpeg() -> bytes:
    return encode_jpeg(np.random.default_rng().integers(0, 256, (9, 12, 3), dtype=np.uint8))


def write_table(path: Path, rows: list[Cells]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.jpg").write_bytes(jpeg())


def one_hot(image: str, label: str, labels: tuple[str, ...]) -> Cells:
    return {"image": image} | {name: "1.0" if name == label else "0.0" for name in labels}


def metadata(image: str, **cells: str) -> Cells:
    usual = {"age_approx": "45", "anatom_site_general": "upper extremity", "lesion_id": "HAM_0000123", "sex": "female"}
    return {"image": image} | usual | cells


def row_2020(image: str, **cells: str) -> Cells:
    usual = {
        "image_name": image,
        "patient_id": "IP_7279968",
        "sex": "male",
        "age_approx": "45",
        "anatom_site_general_challenge": "upper extremity",
        "diagnosis": "nevus",
        "benign_malignant": "benign",
        "target": "0",
    }
    return usual | cells


def records(source: Any, folder: Path) -> dict[str, dict[str, Any]]:
    found = {line["image_id"]: line for line in scan(source, folder).records.to_pylist()}
    return {image: line | {"concepts": dict(line["concepts"])} for image, line in found.items()}


def reasons(source: Any, folder: Path) -> dict[str | None, str]:
    return {line["image_id"]: line["reason"] for line in scan(source, folder).quarantined.to_pylist()}


@pytest.fixture
def set_2018(tmp_path: Path) -> Path:
    """One image of each of the seven labels."""
    names = [f"ISIC_{34524 + number:07d}" for number in range(7)]
    write_images(tmp_path / "ISIC2018_Task3_Test_Input", names)
    rows = [one_hot(name, label, LABELS_2018) for name, label in zip(names, LABELS_2018, strict=True)]
    write_table(tmp_path / TRUTH_2018, rows)
    return tmp_path


@pytest.fixture
def set_2019(tmp_path: Path) -> Path:
    """One image of each of the nine labels, the last two reduced by the publisher."""
    names = [f"ISIC_{number:07d}" for number in range(7)] + ["ISIC_0000091_downsampled", "ISIC_0000181_downsampled"]
    write_images(tmp_path / "ISIC_2019_Training_Input", names)
    rows = [one_hot(name, label, LABELS_2019) for name, label in zip(names, LABELS_2019, strict=True)]
    write_table(tmp_path / TRUTH_2019, rows)
    write_table(tmp_path / METADATA_2019, [metadata(name) for name in names])
    return tmp_path


@pytest.fixture
def set_2020(tmp_path: Path) -> Path:
    """Four images of Kaggle's names."""
    names = [f"ISIC_{number:07d}" for number in range(4)]
    write_images(tmp_path / "train", names)
    write_table(tmp_path / "train.csv", [row_2020(name) for name in names])
    return tmp_path


# ISIC 2018 Task 3 test set


def test_every_image_of_2018_stands_on_the_official_test_side_with_its_label(set_2018):
    found = records(Isic2018Test(), set_2018)
    assert [line["source_label"] for line in found.values()] == list(LABELS_2018)
    assert [line["diagnosis"] for line in found.values()] == [label.lower() for label in LABELS_2018]
    assert {line["official_split"] for line in found.values()} == {"test"}
    assert found["ISIC_0034524"]["file"] == "ISIC2018_Task3_Test_Input/ISIC_0034524.jpg"
    assert {(line["age_years"], line["sex"], line["site"], line["lesion_id"]) for line in found.values()} == {
        (None, None, None, None)
    }
    assert reasons(Isic2018Test(), set_2018) == {}


def set_2018_may_be_joined_with_the_metadata_of_the_2019_test_set(set_2018):
    before = Isic2018Test().fingerprint(set_2018)
    known = {"age_approx": "70.0", "anatom_site_general": "posterior torso", "sex": "male"}
    unknown = {"age_approx": "", "anatom_site_general": "", "sex": ""}
    others = [{"image": f"ISIC_{number:07d}_downsampled"} | unknown for number in range(3)]
    write_table(
        set_2018 / METADATA_2018, [{"image": "ISIC_0034524"} | known, {"image": "ISIC_0034525"} | unknown, *others]
    )
    found = records(Isic2018Test(), set_2018)
    first = found.pop("ISIC_0034524")
    assert (first["age_years"], first["sex"], first["site"]) == (70, "male", "back")
    assert first["concepts"] == {"site": "posterior torso"}
    assert {(line["age_years"], line["sex"], line["site"]) for line in found.values()} == {(None, None, None)}
    assert reasons(Isic2018Test(), set_2018) == {}, "rows of the 2019 test set's other images are not this source's"
    assert Isic2018Test().fingerprint(set_2018) != before


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"NV": "1.0"}, ["MEL, NV is 1", "exactly one"]),
        ({"MEL": "0.0"}, ["no label is 1"]),
        ({"MEL": "0.5"}, ["MEL '0.5' is neither 0 nor 1"]),
        ({"MEL": ""}, ["MEL ''"]),
        ({"DF": "nan"}, ["DF 'nan'"]),
        ({"DF": "-1"}, ["DF '-1'"]),
    ],
)
def test_a_row_that_is_not_one_hot_is_quarantined_with_what_it_says(set_2018, cells, words):
    names = [f"ISIC_{34524 + number:07d}" for number in range(7)]
    rows = [one_hot(name, label, LABELS_2018) for name, label in zip(names, LABELS_2018, strict=True)]
    write_table(set_2018 / TRUTH_2018, [rows[0] | cells, *rows[1:]])
    found = reasons(Isic2018Test(), set_2018)
    assert list(found) == ["ISIC_0034524"]
    assert all(word in found["ISIC_0034524"] for word in ["table line 2", *words])
    assert len(records(Isic2018Test(), set_2018)) == 6


@pytest.mark.parametrize("form", ["1", "1.0", "1."])
def test_one_may_be_written_as_a_whole_number(set_2018, form):
    text = (set_2018 / TRUTH_2018).read_text()
    (set_2018 / TRUTH_2018).write_text(text.replace("1.0", form).replace("0.0", "0"))
    assert len(records(Isic2018Test(), set_2018)) == 7


def set_2018_may_lie_in_the_publishers_archives(set_2018, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zipped")
    with zipfile.ZipFile(folder / "ISIC2018_Task3_Test_Input.zip", "w") as archive:
        for path in (set_2018 / "ISIC2018_Task3_Test_Input").iterdir():
            archive.write(path, f"ISIC2018_Task3_Test_Input/{path.name}")
        archive.writestr("ISIC2018_Task3_Test_Input/LICENSE.txt", "CC BY-NC 4.0")
    with zipfile.ZipFile(folder / "ISIC2018_Task3_Test_GroundTruth.zip", "w") as archive:
        archive.write(set_2018 / TRUTH_2018, f"ISIC2018_Task3_Test_GroundTruth/{TRUTH_2018}")
    Isic2018Test().prepare(folder)
    assert records(Isic2018Test(), folder).keys() == records(Isic2018Test(), set_2018).keys()


# ISIC 2019 training set


def test_2019_tells_ak_from_scc_and_neither_is_akiec(set_2019):
    found = records(Isic2019(), set_2019)
    assert {line["source_label"]: line["diagnosis"] for line in found.values()} == {
        **{label: label.lower() for label in LABELS_2019},
        "UNK": None,
    }
    malignant = {line["source_label"] for line in found.values() if line["malignant"]}
    assert malignant == {"MEL", "BCC", "SCC"}
    assert {line["official_split"] for line in found.values()} == {None}
    assert Isic2019().diagnoses["unk"] is None
    assert "akiec" not in Isic2019().diagnoses


def test_a_reduced_image_keeps_its_name(set_2019):
    found = records(Isic2019(), set_2019)
    assert found["ISIC_0000091_downsampled"]["source_label"] == "SCC"
    assert found["ISIC_0000091_downsampled"]["lesion_id"] == "HAM_0000123"
    assert "ISIC_0000091" not in found


@pytest.mark.parametrize("word", ["", "nan", "unknown", "0", "0.0"])
def test_what_the_2019_metadata_do_not_say_is_unknown(set_2019, word):
    names = [path.stem for path in (set_2019 / "ISIC_2019_Training_Input").iterdir()]
    other = "" if word.startswith("0") else word
    unknown = {"age_approx": word, "anatom_site_general": other, "lesion_id": other, "sex": other}
    write_table(set_2019 / METADATA_2019, [metadata(name, **unknown) for name in names])
    found = records(Isic2019(), set_2019)
    assert len(found) == 9
    assert {(line["age_years"], line["site"], line["lesion_id"], line["sex"]) for line in found.values()} == {
        (None, None, None, None)
    }
    assert all(line["concepts"] == {} for line in found.values())


def test_an_image_of_the_2019_truth_alone_is_kept_and_one_of_the_metadata_alone_is_quarantined(set_2019):
    rows = [metadata(f"ISIC_{number:07d}") for number in range(1, 7)]
    write_images(set_2019 / "ISIC_2019_Training_Input", ["ISIC_0000777"])
    write_table(set_2019 / METADATA_2019, [*rows, metadata("ISIC_0000777"), metadata("ISIC_0000888")])
    found = records(Isic2019(), set_2019)
    assert len(found) == 9
    first = found["ISIC_0000000"]
    assert (first["diagnosis"], first["age_years"], first["lesion_id"]) == ("mel", None, None)
    quarantined = {line["image_id"]: line for line in scan(Isic2019(), set_2019).quarantined.to_pylist()}
    assert quarantined.keys() == {"ISIC_0000777", "ISIC_0000888"}
    assert quarantined["ISIC_0000777"]["file"] == "ISIC_2019_Training_Input/ISIC_0000777.jpg"
    assert all(METADATA_2019 in line["reason"] and TRUTH_2019 in line["reason"] for line in quarantined.values())


def test_broken_2019_metadata_are_named_and_not_taken_for_unknown(set_2019):
    path = set_2019 / METADATA_2019
    lines = path.read_text().splitlines()
    lines[1] += ",surplus"
    lines += [lines[3].replace("female", "male"), ",50,,,"]
    path.write_text("\n".join(lines))
    found = reasons(Isic2019(), set_2019)
    assert found.keys() == {"ISIC_0000000", "ISIC_0000002", None}
    assert f"{METADATA_2019} line 2: the row has 6 cells" in found["ISIC_0000000"]
    assert found["ISIC_0000002"] == f"{METADATA_2019} line 11: image ISIC_0000002 is already in line 4, which is kept"
    assert found[None] == f"{METADATA_2019} line 12: no image"
    assert records(Isic2019(), set_2019)["ISIC_0000002"]["sex"] == "female"


@pytest.mark.parametrize(
    ("cells", "word"),
    [
        ({"anatom_site_general": "left knee"}, "anatom_site_general 'left knee'"),
        ({"sex": "x"}, "sex 'x'"),
        ({"age_approx": "old"}, "age_approx 'old'"),
    ],
)
def test_a_word_outside_the_vocabulary_is_quarantined(set_2019, cells, word):
    names = sorted(path.stem for path in (set_2019 / "ISIC_2019_Training_Input").iterdir())
    write_table(set_2019 / METADATA_2019, [metadata(names[0], **cells), *(metadata(name) for name in names[1:])])
    found = reasons(Isic2019(), set_2019)
    assert list(found) == [names[0]]
    assert word in found[names[0]]


@pytest.mark.parametrize(
    ("word", "site"),
    [
        ("anterior torso", Site.FRONT_OF_TRUNK),
        ("posterior torso", Site.BACK),
        ("lateral torso", Site.SIDE_OF_TRUNK),
        ("torso", Site.TRUNK),
        ("head/neck", Site.HEAD_OR_NECK),
        ("palms/soles", Site.PALM_OR_SOLE),
        ("oral/genital", Site.ORAL_OR_GENITAL),
        ("upper extremity", Site.UPPER_EXTREMITY),
        ("lower extremity", Site.LOWER_EXTREMITY),
    ],
)
def test_the_archives_word_for_a_site_is_kept_where_it_is_not_the_sites_own(set_2019, set_2020, word, site):
    names = [path.stem for path in (set_2019 / "ISIC_2019_Training_Input").iterdir()]
    write_table(set_2019 / METADATA_2019, [metadata(name, anatom_site_general=word) for name in names])
    rows = [row_2020(f"ISIC_{number:07d}", anatom_site_general_challenge=word) for number in range(4)]
    write_table(set_2020 / "train.csv", rows)
    expected = {} if word == site.value else {"site": word}
    for line in (*Isic2019().list_images(set_2019).candidates, *Isic2020().list_images(set_2020).candidates):
        assert line.site is site
        assert line.concepts == expected


# ISIC 2020 training set


@pytest.mark.parametrize(
    ("label", "diagnosis"),
    [
        ("nevus", "nv"),
        ("melanoma", "mel"),
        ("seborrheic keratosis", "bkl"),
        ("lichenoid keratosis", "bkl"),
        ("solar lentigo", "bkl"),
        ("lentigo NOS", None),
        ("cafe-au-lait macule", None),
        ("atypical melanocytic proliferation", None),
        ("unknown", None),
    ],
)
def test_a_label_of_2020_is_mapped_and_kept(set_2020, label, diagnosis):
    write_table(set_2020 / "train.csv", [row_2020(f"ISIC_{number:07d}", diagnosis=label) for number in range(4)])
    found = records(Isic2020(), set_2020)
    assert {(line["source_label"], line["diagnosis"]) for line in found.values()} == {(label, diagnosis)}
    assert label.lower() in Isic2020().diagnoses


@pytest.mark.parametrize("word", ["", "NaN", "n/a"])
def test_a_missing_label_of_2020_is_none_and_the_publishers_unknown_stays(set_2020, word):
    rows = [row_2020("ISIC_0000000", diagnosis=word), row_2020("ISIC_0000001", diagnosis="unknown")]
    write_table(set_2020 / "train.csv", rows)
    found = records(Isic2020(), set_2020)
    assert [found[image]["source_label"] for image in sorted(found)] == ["", "unknown"]
    assert [found[image]["diagnosis"] for image in sorted(found)] == [None, None]


@pytest.mark.parametrize(
    ("word", "target", "malignant"),
    [
        ("malignant", "1", True),
        ("Malignant", "1", True),
        ("benign", "0", False),
        ("BENIGN", "0.0", False),
        ("", "1", True),
        ("malignant", "", True),
        ("", "", None),
    ],
)
def test_malignant_is_what_2020_says_whatever_the_diagnosis(set_2020, word, target, malignant):
    cells = {"diagnosis": "unknown", "benign_malignant": word, "target": target}
    write_table(set_2020 / "train.csv", [row_2020(f"ISIC_{number:07d}", **cells) for number in range(4)])
    assert {line["malignant"] for line in records(Isic2020(), set_2020).values()} == {malignant}


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"benign_malignant": "malignant"}, "benign_malignant 'malignant' contradicts target '0'"),
        ({"target": "1"}, "benign_malignant 'benign' contradicts target '1'"),
        ({"target": "2"}, "target '2' is outside the vocabulary"),
        ({"benign_malignant": "malign"}, "allowed: benign, malignant"),
        ({"diagnosis": "wart"}, "diagnosis 'wart' is outside the vocabulary"),
        ({"image_name": "../ISIC_0000000"}, "not a safe name"),
    ],
)
def test_a_row_of_2020_that_contradicts_itself_or_the_vocabulary_is_quarantined(set_2020, cells, words):
    rows = [row_2020(f"ISIC_{number:07d}") for number in range(4)]
    write_table(set_2020 / "train.csv", [rows[0] | cells, *rows[1:]])
    found = reasons(Isic2020(), set_2020)
    assert words in found[cells.get("image_name", "ISIC_0000000")]
    assert len(records(Isic2020(), set_2020)) == 3


def test_2020_keeps_the_patient_and_what_only_the_newer_table_knows(set_2020):
    (set_2020 / "train.csv").unlink()
    rows = [
        {"lesion_id": lesion} | row_2020(f"ISIC_{number:07d}", patient_id=patient)
        for number, (lesion, patient) in enumerate(
            [("IL_0843038", "IP_1"), ("IL_0843038", "IP_1"), ("", "IP_2"), ("nan", "")]
        )
    ]
    write_table(set_2020 / "ISIC_2020_Training_GroundTruth_v2.csv", rows)
    found = records(Isic2020(), set_2020).values()
    assert [line["lesion_id"] for line in found] == ["IL_0843038", "IL_0843038", None, None]
    assert [line["patient_id"] for line in found] == ["IP_1", "IP_1", "IP_2", None]


@pytest.mark.parametrize("subfolder", [".", "ISIC_2020_Training_JPEG", "ISIC_2020_Training_JPEG/train", "jpeg/train"])
def test_the_images_of_2020_may_lie_where_the_publisher_or_kaggle_puts_them(set_2020, subfolder):
    (set_2020 / subfolder).mkdir(parents=True, exist_ok=True)
    for path in list((set_2020 / "train").iterdir()):
        path.rename(set_2020 / subfolder / path.name)
    (set_2020 / "train.csv").rename(set_2020 / "ISIC_2020_Training_GroundTruth.csv")
    assert len(records(Isic2020(), set_2020)) == 4


def test_the_archive_of_2020_holds_the_folder_train(set_2020, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zipped")
    with zipfile.ZipFile(folder / "ISIC_2020_Training_JPEG.zip", "w") as archive:
        for path in (set_2020 / "train").iterdir():
            archive.write(path, f"train/{path.name}")
    (set_2020 / "train.csv").rename(folder / "train.csv")
    Isic2020().prepare(folder)
    found = records(Isic2020(), folder)
    assert found["ISIC_0000000"]["file"] == "ISIC_2020_Training_JPEG/train/ISIC_0000000.jpg"


def test_the_publishers_duplicates_of_2020_are_named_on_both_sides(set_2020):
    before = Isic2020().fingerprint(set_2020)
    pairs = [("ISIC_0000000", "ISIC_0000002"), ("ISIC_0000003", "ISIC_0000000"), ("ISIC_7777777", "ISIC_8888888")]
    write_table(set_2020 / DUPLICATES_2020, [{"image_name_1": one, "image_name_2": other} for one, other in pairs])
    found = records(Isic2020(), set_2020)
    assert {image: line["concepts"].get("publisher_duplicate") for image, line in found.items()} == {
        "ISIC_0000000": "ISIC_0000002, ISIC_0000003",
        "ISIC_0000001": None,
        "ISIC_0000002": "ISIC_0000000",
        "ISIC_0000003": "ISIC_0000000",
    }
    lesions = {image: line["lesion_id"] for image, line in found.items()}
    assert lesions.pop("ISIC_0000001") is None
    assert set(lesions.values()) == {"duplicates_of_ISIC_0000000"}  # so that no split parts them
    assert reasons(Isic2020(), set_2020) == {}
    assert Isic2020().fingerprint(set_2020) != before


def test_a_row_of_the_duplicates_that_is_no_pair_is_quarantined(set_2020):
    (set_2020 / DUPLICATES_2020).write_text(
        "image_name_1,image_name_2\nISIC_0000000,\nISIC_0000001\nISIC_2,ISIC_2\nISIC_0000003,NaN\n"
    )
    found = reasons(Isic2020(), set_2020)
    assert {image: reason.partition(": ")[0] for image, reason in found.items()} == {
        "ISIC_0000000": f"{DUPLICATES_2020} line 2",
        "ISIC_0000001": f"{DUPLICATES_2020} line 3",
        "ISIC_2": f"{DUPLICATES_2020} line 4",
        "ISIC_0000003": f"{DUPLICATES_2020} line 5",
    }
    found = records(Isic2020(), set_2020)
    assert [found[image]["lesion_id"] for image in sorted(found)] == [None] * 4


# All three


CASES = [
    (Isic2018Test(), "set_2018", [TRUTH_2018], "ISIC2018_Task3_Test_Input"),
    (Isic2019(), "set_2019", [TRUTH_2019, METADATA_2019], "ISIC_2019_Training_Input"),
    (Isic2020(), "set_2020", ["train.csv"], "train"),
]


@pytest.mark.parametrize(("source", "fixture", "tables", "images"), CASES)
def test_the_fingerprint_changes_with_every_table_and_image_and_only_then(request, source, fixture, tables, images):
    folder = request.getfixturevalue(fixture)
    seen = [source.fingerprint(folder)]
    (folder / "ATTRIBUTION.txt").write_text("no part of the source")
    assert source.fingerprint(folder) == seen[0]
    for path in [*(folder / table for table in tables), next((folder / images).iterdir())]:
        path.write_bytes(path.read_bytes() + b"\n")
        seen.append(source.fingerprint(folder))
    (folder / images / "ISIC_9999999.jpg").write_bytes(jpeg())
    seen.append(source.fingerprint(folder))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(("source", "fixture", "tables", "images"), CASES)
def test_a_missing_folder_table_or_image_says_what_is_expected(
    request, source, fixture, tables, images, tmp_path_factory
):
    folder = request.getfixturevalue(fixture)
    source.prepare(folder)
    for look in (source.prepare, source.list_images, source.fingerprint):
        with pytest.raises(
            FileNotFoundError, match=rf"{source.title} is looked for in .*nowhere.*Expected there.*{images}"
        ):
            look(folder / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"no .*\.csv in .*Expected there"):
            look(tmp_path_factory.mktemp("empty"))
    for path in (folder / images).iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no image file in"):
        source.prepare(folder)
    for table in tables:
        whole = (folder / table).read_text()
        (folder / table).write_text("image,something\nISIC_0000000,1\n")
        with pytest.raises(ValueError, match=f"{table} has no column"):
            source.prepare(folder)
        (folder / table).write_text(whole)


@pytest.mark.parametrize(("source", "fixture", "tables", "images"), CASES)
def test_rows_and_files_that_do_not_meet_are_quarantined(request, source, fixture, tables, images):
    folder = request.getfixturevalue(fixture)
    gone, *_ = sorted((folder / images).iterdir())
    gone.rename(gone.with_name("ISIC_9999999.jpg"))
    found = reasons(source, folder)
    assert found.keys() == {gone.stem, "ISIC_9999999"}
    assert "missing on disk" in found[gone.stem]
    assert "not in the table" in found["ISIC_9999999"]


@pytest.mark.parametrize(("source", "fixture", "tables", "images"), CASES)
def test_a_tables_form_does_not_matter(request, source, fixture, tables, images):
    """A byte order mark, semicolons, CRLF and an index column without a name."""
    folder = request.getfixturevalue(fixture)
    expected = records(source, folder)
    for table in tables:
        lines = (folder / table).read_text().splitlines()
        numbered = [f"{number or ''},{line}" for number, line in enumerate(lines)]
        (folder / table).write_bytes("\r\n".join(numbered).replace(",", ";").encode("utf-8-sig"))
    assert records(source, folder) == expected


def test_two_tables_under_different_names_are_an_error(set_2020):
    write_table(set_2020 / "ISIC_2020_Training_GroundTruth.csv", [row_2020("ISIC_0000000")])
    with pytest.raises(ValueError, match=r"several tables: train\.csv, ISIC_2020_Training_GroundTruth\.csv"):
        Isic2020().list_images(set_2020)


def test_of_two_rows_with_one_image_the_first_is_kept(set_2020):
    rows = [row_2020(f"ISIC_{number:07d}") for number in range(4)]
    write_table(set_2020 / "train.csv", [*rows, row_2020("ISIC_0000002", sex="female")])
    assert "already in line 4" in reasons(Isic2020(), set_2020)["ISIC_0000002"]
    assert records(Isic2020(), set_2020)["ISIC_0000002"]["sex"] == "male"


def test_an_image_of_2019_has_the_name_by_which_other_sources_know_it(set_2019):
    """HAM10000 is part of ISIC 2019, with the same image and lesion ids; a reduced image is the same image."""
    found = scan(Isic2019(), set_2019).records
    assert archive_names(found["image_id"]).to_pylist() == sorted(
        [f"ISIC_{number:07d}" for number in range(7)] + ["ISIC_0000091", "ISIC_0000181"]
    )
    assert archive_names(found["lesion_id"]).to_pylist() == ["HAM_0000123"] * 9


@pytest.mark.parametrize("source", [Isic2018Test(), Isic2019(), Isic2020()])
def test_every_label_has_its_meaning_written_down(source):
    assert all(label == label.lower() for label in source.diagnoses)
    assert source.licence == "CC BY-NC 4.0"
    assert all((source.title, source.citation, source.homepage))
