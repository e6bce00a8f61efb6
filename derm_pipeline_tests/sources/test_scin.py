"""SCIN's adapter, on small tables in the publisher's layout and with the publisher's columns."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.images import encode_png
from derm_pipeline.sources import scan
from derm_pipeline.sources.listing import BadRowError
from derm_pipeline.sources.scin import Scin
from derm_pipeline.sources.scin_labels import MAX_WEIGHTS_CHARS, parse_weights

RACES = (
    *("american_indian_or_alaska_native", "asian", "black_or_african_american", "hispanic_latino_or_spanish_origin"),
    *("middle_eastern_or_north_african", "native_hawaiian_or_pacific_islander", "white", "other_race"),
    *("prefer_not_to_answer", "two_or_more_after_mitigation"),
)
PARTS = (
    *("head_or_neck", "arm", "palm", "back_of_hand", "torso_front", "torso_back", "genitalia_or_groin", "buttocks"),
    *("leg", "foot_top_or_side", "foot_sole", "other"),
)
CASE_COLUMNS = (
    *("case_id", "source", "release", "year", "age_group", "sex_at_birth", "fitzpatrick_skin_type"),
    *(f"race_ethnicity_{race}" for race in RACES),
    *("textures_raised_or_bumpy", "textures_flat", "textures_rough_or_flaky", "textures_fluid_filled"),
    *(f"body_parts_{part}" for part in PARTS),
    *("condition_symptoms_bleeding", "condition_symptoms_itching", "other_symptoms_fever", "other_symptoms_chills"),
    *("related_category", "condition_duration"),
    *(f"image_{number}_{what}" for what in ("path", "shot_type") for number in (1, 2, 3)),
)
TYPE = "dermatologist_fitzpatrick_skin_type_label_"
LABEL_COLUMNS = (
    *("case_id", "dermatologist_skin_condition_on_label_name", "dermatologist_skin_condition_confidence"),
    *("weighted_skin_condition_label", f"{TYPE}1", f"{TYPE}2", f"{TYPE}3"),
    *("monk_skin_tone_label_india", "monk_skin_tone_label_us"),
)
CASE = "-3205742176803893704"
STEM = "-1234567890123456789"
SCIN = Scin()


def case(case_id: str = CASE, *stems: str, **cells: str) -> dict[str, str]:
    paths = {f"image_{number}_path": f"dataset/images/{stem}.png" for number, stem in enumerate(stems or (STEM,), 1)}
    known = {"case_id": case_id, "source": "SCIN", "release": "1.0.0", "year": "2023", "image_1_shot_type": "CLOSE_UP"}
    return dict.fromkeys(CASE_COLUMNS, "") | known | paths | cells


def label(case_id: str = CASE, weights: str = "{'Eczema': 0.75, 'Tinea': 0.25}", **cells: str) -> dict[str, str]:
    return dict.fromkeys(LABEL_COLUMNS, "") | {"case_id": case_id, "weighted_skin_condition_label": weights} | cells


def write_table(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write(
    folder: Path, cases: list[dict[str, str]], labels: list[dict[str, str]], tables: str = "dataset", images: str = ""
) -> Path:
    rng = np.random.default_rng()
    at = folder / (images or "dataset/images")
    for path in (folder / tables, at):
        path.mkdir(parents=True, exist_ok=True)
    names = {Path(row[f"image_{number}_path"]).name for row in cases for number in (1, 2, 3)} - {""}
    for name in names:
        (at / name).write_bytes(encode_png(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)))
    write_table(folder / tables / "scin_cases.csv", cases, CASE_COLUMNS)
    write_table(folder / tables / "scin_labels.csv", labels, LABEL_COLUMNS)
    return folder


def records(folder: Path) -> dict[str, dict]:
    rows = scan(SCIN, folder).records.to_pylist()
    return {row["image_id"]: row | {"concepts": dict(row["concepts"])} for row in rows}


def only_record(folder: Path, of_case: dict[str, str] | None = None, of_label: dict[str, str] | None = None) -> dict:
    (record,) = records(write(folder, [case(**(of_case or {}))], [label(**(of_label or {}))])).values()
    return record


def reasons(folder: Path) -> list[str]:
    return [row["reason"] for row in scan(SCIN, folder).quarantined.to_pylist()]


def only_bad(folder: Path, cases: list[dict[str, str]], labels: list[dict[str, str]]) -> str:
    """The one reason, beside a case in order that is read all the same."""
    good = "777"
    found = scan(SCIN, write(folder, [case(good, "good"), *cases], [label(good), *labels]))
    assert found.records["lesion_id"].to_pylist() == [good]
    (row,) = found.quarantined.to_pylist()
    return row["reason"]


def test_a_case_becomes_a_clinical_record_for_each_of_its_images(tmp_path):
    stems = ("-111", "222", "-333")
    found = records(write(tmp_path, [case(CASE, *stems, image_3_shot_type="AT_DISTANCE")], [label()]))
    assert set(found) == {f"scin_{stem}" for stem in stems}
    assert {record["diagnosis"] for record in found.values()} == {"eczema"}
    assert {(record["lesion_id"], record["patient_id"]) for record in found.values()} == {(CASE, CASE)}
    assert {record["modality"] for record in found.values()} == {"clinical"}
    assert found["scin_-111"]["file"] == "dataset/images/-111.png"
    shots = {stem: found[f"scin_{stem}"]["concepts"].get("shot_type") for stem in stems}
    assert shots == {"-111": "CLOSE_UP", "222": None, "-333": "AT_DISTANCE"}


def test_the_condition_is_the_diagnosis_and_ethnicity_is_a_group_and_never_the_label(tmp_path):
    yes = {"race_ethnicity_asian": "YES", "race_ethnicity_white": "YES"}
    record = only_record(tmp_path, yes, {"weights": "{'Herpes Zoster': 0.6, 'Eczema': 0.4}"})
    assert (record["source_label"], record["diagnosis"]) == ("Herpes Zoster", "herpes_zoster")
    assert record["ethnicity"] == "asian,white"
    assert json.loads(record["concepts"]["weighted_labels"]) == {"Herpes Zoster": 0.6, "Eczema": 0.4}


@pytest.mark.parametrize(
    ("cells", "ethnicity"),
    [
        ({}, None),
        ({"race_ethnicity_prefer_not_to_answer": "YES"}, None),
        ({"race_ethnicity_white": "True", "race_ethnicity_black_or_african_american": "true"},
         "black_or_african_american,white"),
        ({"race_ethnicity_hispanic_latino_or_spanish_origin": "1"}, "hispanic_latino_or_spanish_origin"),
        ({"race_ethnicity_two_or_more_after_mitigation": "YES"}, "two_or_more_after_mitigation"),
        ({"race_ethnicity_other_race": "NO", "race_ethnicity_white": "False"}, None),
    ],
)  # fmt: skip
def test_ethnicity_joins_the_columns_that_say_yes_in_their_order(tmp_path, cells, ethnicity):
    assert only_record(tmp_path, cells)["ethnicity"] == ethnicity


def test_a_case_id_that_looks_like_a_number_stays_text_to_its_last_digit(tmp_path):
    near = str(int(CASE) + 1)
    assert float(near) == float(CASE)
    folder = write(tmp_path, [case(CASE, "1"), case(near, "2")], [label(near, "{'Acne': 1.0}"), label(CASE)])
    found = records(folder)
    assert (found["scin_1"]["diagnosis"], found["scin_2"]["diagnosis"]) == ("eczema", "acne")
    assert (found["scin_1"]["patient_id"], found["scin_2"]["patient_id"]) == (CASE, near)


@pytest.mark.parametrize("rounded", ["-3.20574E+18", "-3.2057421768038937e+18", "12345.0", "5e18"])
def test_a_case_id_that_a_program_rounded_is_refused(tmp_path, rounded):
    found = reasons(write(tmp_path, [case("777", "good"), case(rounded, "other")], [label("777"), label(rounded)]))
    assert sum("rounded" in reason for reason in found) == 2
    assert any("not in the table" in reason for reason in found)


def test_of_several_largest_weights_the_first_is_the_label_and_the_tie_is_said(tmp_path):
    record = only_record(tmp_path, None, {"weights": "{'Acne': 0.2, 'Psoriasis': 0.4, 'Eczema': 0.4}"})
    assert (record["source_label"], record["diagnosis"]) == ("Psoriasis", "psoriasis")
    assert json.loads(record["concepts"]["label_tie"]) == ["Psoriasis", "Eczema"]


def test_a_single_largest_weight_is_no_tie(tmp_path):
    assert "label_tie" not in only_record(tmp_path)["concepts"]


@pytest.mark.parametrize("weights", ["{}", "", "nan"])
def test_a_case_that_is_gradable_and_has_no_label_has_no_diagnosis(tmp_path, weights):
    record = only_record(tmp_path, None, {"weights": weights})
    assert (record["source_label"], record["diagnosis"], record["malignant"]) == ("", None, None)
    assert "weighted_labels" not in record["concepts"]


def test_a_case_without_a_row_of_labels_has_no_diagnosis(tmp_path):
    record = records(write(tmp_path, [case(fitzpatrick_skin_type="FST2")], []))[f"scin_{STEM}"]
    assert (record["source_label"], record["diagnosis"]) == ("", None)
    assert (record["skin_type"], record["skin_type_origin"]) == (2, "self_reported")


@pytest.mark.parametrize(
    ("condition", "diagnosis"),
    [
        *(("SCC/SCCIS", "scc"), ("Drug Rash", "drug_eruption"), ("Cutaneous lupus", "lupus"), ("SK/ISK", "bkl")),
        *(("Leukocytoclastic Vasculitis", "vasculitis"), ("Verruca vulgaris", "wart"), ("melanoma", "mel")),
        *(("Lichen planus/lichenoid eruption", None), ("CD - Contact dermatitis", None), ("Hypersensitivity", None)),
        *(("Acute dermatitis, NOS", None), ("A condition that nobody has seen", None)),
    ],
)
def test_a_condition_has_the_diagnosis_that_it_is_a_case_of(tmp_path, condition, diagnosis):
    record = only_record(tmp_path, None, {"weights": repr({condition: 1.0})})
    assert (record["source_label"], record["diagnosis"]) == (condition, diagnosis)


@pytest.mark.parametrize(
    "weights",
    [
        *("{'Eczema': 0.69, 'Acne: 0.31}", "['Eczema']", "{'Eczema': 'much'}", "{'Eczema': True}", "{3: 0.5}"),
        *("{'Eczema': -0.1}", "{'Eczema': 1e999}", "{'': 1.0}", "{[]: 1}", "__import__('os')", "{'Eczema': nan}"),
        *("{'Eczema': " + "9" * 400 + "}", "{'\\ud800': 1.0}", "(" * 3000, "-" * 3000 + "1", "{'Eczema': {'a': 1}}"),
        "{'" + "x" * MAX_WEIGHTS_CHARS + "': 1.0}",
    ],
)
def test_weights_that_are_no_dict_of_weights_are_refused(weights):
    with pytest.raises(BadRowError, match="weighted_skin_condition_label"):
        parse_weights(weights)


def test_an_image_whose_labels_are_broken_is_quarantined_with_their_line(tmp_path):
    reason = only_bad(tmp_path, [case()], [label(weights="{'Eczema': ")])
    assert "scin_labels.csv, line 3" in reason
    assert "is not a dict" in reason


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("FST4", "", ""), 4),
        (("FST2", "FST5", ""), 2),
        (("FST6", "FST3", "FST3"), 3),
        (("FST5", "FST1", "FST2"), 2),
    ],
)
def test_the_skin_type_is_the_lower_median_of_the_dermatologists(tmp_path, types, expected):
    given = {f"{TYPE}{number}": word for number, word in enumerate(types, 1)}
    record = only_record(tmp_path, {"fitzpatrick_skin_type": "FST1"}, given)
    assert (record["skin_type"], record["skin_type_origin"]) == (expected, "labelled")
    kept = {name: word for name, word in record["concepts"].items() if "fitzpatrick" in name}
    assert kept == {name: word for name, word in given.items() if word} | {"fitzpatrick_skin_type": "FST1"}


@pytest.mark.parametrize(
    ("own", "skin_type"), [("FST5", 5), ("NONE_SELECTED", None), ("NONE_IDENTIFIED", None), ("", None), ("NaN", None)]
)
def test_without_a_dermatologist_the_skin_type_is_the_persons_own(tmp_path, own, skin_type):
    record = only_record(tmp_path, {"fitzpatrick_skin_type": own})
    assert (record["skin_type"], record["skin_type_origin"]) == (skin_type, skin_type and "self_reported")


def test_both_monk_tones_are_concepts_as_whole_numbers(tmp_path):
    record = only_record(tmp_path, None, {"monk_skin_tone_label_india": "3.0", "monk_skin_tone_label_us": "10"})
    assert (record["concepts"]["monk_india"], record["concepts"]["monk_us"]) == ("3", "10")


@pytest.mark.parametrize(
    ("group", "years"),
    [("AGE_18_TO_29", "18-29"), ("AGE_30_TO_39", "30-39"), ("AGE_80_OR_ABOVE", "80-120"), ("AGE_UNKNOWN", None)],
)
def test_an_age_group_is_a_range_and_never_an_age(tmp_path, group, years):
    record = only_record(tmp_path, {"age_group": group})
    assert (record["age_range"], record["age_years"]) == (years, None)


@pytest.mark.parametrize(("word", "sex"), [("FEMALE", "female"), ("MALE", "male"), ("OTHER_OR_UNSPECIFIED", None)])
def test_a_sex_that_is_not_said_is_unknown(tmp_path, word, sex):
    assert only_record(tmp_path, {"sex_at_birth": word})["sex"] == sex


@pytest.mark.parametrize(
    ("parts", "site"),
    [
        *((("arm",), "upper extremity"), (("palm",), "hand"), (("foot_sole",), "foot"), (("torso_back",), "back")),
        *((("torso_front",), "front of the trunk"), (("genitalia_or_groin",), "genital"), (("other",), None)),
        *((("arm", "leg"), None), ((), None)),
    ],
)
def test_only_a_single_body_part_is_a_site(tmp_path, parts, site):
    record = only_record(tmp_path, {f"body_parts_{part}": "YES" for part in parts})
    assert (record["site"], record["concepts"].get("body_parts")) == (site, ",".join(parts) or None)


def test_textures_symptoms_duration_and_category_are_concepts(tmp_path):
    words = {"condition_duration": "ONE_TO_FOUR_WEEKS", "related_category": "RASH"}
    yes = ("textures_flat", "condition_symptoms_itching", "other_symptoms_fever", "other_symptoms_chills")
    concepts = only_record(tmp_path, dict.fromkeys(yes, "YES") | words)["concepts"]
    assert concepts.items() >= words.items()
    assert (concepts["textures"], concepts["condition_symptoms"]) == ("flat", "itching")
    assert concepts["other_symptoms"] == "fever,chills"


def test_nan_in_every_column_gives_a_record_of_unknowns(tmp_path):
    path = "image_1_path"
    of_case = dict.fromkeys(set(CASE_COLUMNS) - {"case_id", path}, "NaN") | {path: "dataset/images/5.png"}
    folder = write(tmp_path, [case() | of_case], [label() | dict.fromkeys(LABEL_COLUMNS[1:], "NaN")])
    (folder / "dataset/images/NaN").unlink()
    (record,) = records(folder).values()
    unknown = ("diagnosis", "malignant", "age_range", "sex", "site", "skin_type", "skin_type_origin", "ethnicity")
    assert [record[column] for column in unknown] == [None] * len(unknown)
    assert record["concepts"] == {}


def test_labels_without_a_case_are_quarantined(tmp_path):
    assert "'888' is not in scin_cases.csv" in only_bad(tmp_path, [], [label("888")])


def test_a_second_row_of_a_case_or_of_its_labels_is_quarantined(tmp_path):
    folder = write(tmp_path, [case("777", "1"), case("777", "1")], [label("777"), label("777", "{'Acne': 1.0}")])
    found = reasons(folder)
    assert len(found) == 2
    assert any("scin_cases.csv, line 3" in reason and "already in line 2" in reason for reason in found)
    assert any("scin_labels.csv, line 3" in reason and "already in line 2" in reason for reason in found)
    assert records(folder)["scin_1"]["diagnosis"] == "eczema"


def test_a_case_without_an_image_and_one_without_an_id_are_said(tmp_path):
    assert "no image" in only_bad(tmp_path / "a", [case(image_1_path="")], [label()])
    reason = only_bad(tmp_path / "b", [case("", image_1_path="")], [])
    assert "scin_cases.csv, line 3: the row has no case_id" in reason


def test_words_outside_the_vocabulary_are_quarantined_and_named(tmp_path):
    bad = {
        "age_group": "AGE_0_TO_17",
        "sex_at_birth": "X",
        "fitzpatrick_skin_type": "FST7",
        "race_ethnicity_asian": "perhaps",
        "body_parts_arm": "2",
    }
    for number, (column, word) in enumerate(bad.items()):
        reason = only_bad(tmp_path / str(number), [case() | {column: word}], [label()])
        assert f"{column} '{word}'" in reason
    reason = only_bad(tmp_path / "monk", [case()], [label(monk_skin_tone_label_us="11")])
    assert "monk_skin_tone_label_us '11'" in reason


@pytest.mark.parametrize("path", ["dataset/images/../../../other.png", "/other.png", "../other.png"])
def test_a_path_that_leaves_the_folder_is_refused_also_where_such_a_file_is_inside(tmp_path, path):
    assert "leaves the source's folder" in only_bad(tmp_path, [case(image_1_path=path)], [label()])


def test_a_missing_image_is_named_and_the_others_of_its_case_stay(tmp_path):
    folder = write(tmp_path, [case(CASE, "1", "2")], [label()])
    (folder / "dataset/images/2.png").unlink()
    assert set(records(folder)) == {"scin_1"}
    assert reasons(folder) == ["the file is missing on disk"]


def test_cases_that_hold_the_same_image_stay_together(tmp_path):
    cases = [case("10", "a", "b"), case("20", "c"), case("30", "b", "d"), case("40", "d", "e"), case("50", "f")]
    folder = write(tmp_path, cases, [label(row["case_id"]) for row in cases])
    patients = {image_id: record["patient_id"] for image_id, record in records(folder).items()}
    assert {patients[f"scin_{stem}"] for stem in "abde"} == {"10"}
    assert (patients["scin_c"], patients["scin_f"]) == ("20", "50")
    assert len(reasons(folder)) == 2
    assert all("already in line" in reason for reason in reasons(folder))
    assert records(folder)["scin_e"]["lesion_id"] == "40"


@pytest.mark.parametrize("tables", [".", "dataset"])
@pytest.mark.parametrize("images", [".", "images", "dataset", "dataset/images"])
def test_tables_and_images_may_lie_in_dataset_or_not_and_the_fingerprint_covers_them(tmp_path, tables, images):
    folder = write(tmp_path, [case()], [label()], tables, images)
    SCIN.prepare(folder)
    assert set(records(folder)) == {f"scin_{STEM}"}
    prints = {SCIN.fingerprint(folder)}
    (folder / images / "another.png").write_bytes(b"another")
    prints.add(SCIN.fingerprint(folder))
    for table in ("scin_cases.csv", "scin_labels.csv"):
        with (folder / tables / table).open("a") as file:
            file.write("\n")
        prints.add(SCIN.fingerprint(folder))
    assert len(prints) == 4


def test_the_errors_say_where_is_looked_and_for_what(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder.*dx-scin-public-data"):
        SCIN.prepare(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"scin_cases\.csv.*dx-scin-public-data"):
        SCIN.prepare(tmp_path)
    folder = write(tmp_path, [case(image_1_path="")], [label()])
    with pytest.raises(FileNotFoundError, match="no image file"):
        SCIN.prepare(folder)
    (folder / "dataset/scin_labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"scin_labels\.csv"):
        SCIN.list_images(folder)
    write_table(folder / "dataset/scin_labels.csv", [{"case_id": CASE}], ("case_id",))
    with pytest.raises(ValueError, match="weighted_skin_condition_label"):
        SCIN.list_images(folder)
