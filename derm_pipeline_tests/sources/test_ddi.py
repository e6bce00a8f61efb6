"""DDI's adapter, on a small folder in the publisher's layout."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.images import encode_png
from derm_pipeline.sources import scan
from derm_pipeline.sources.ddi import Ddi

COLUMNS = ("", "DDI_ID", "DDI_file", "skin_tone", "malignant", "disease")
DDI = Ddi()


def row(number: int, **cells: str) -> dict[str, str]:
    values = (str(number - 1), str(number), f"{number:06d}.png", "56", "False", "melanocytic-nevi")
    return dict(zip(COLUMNS, values, strict=True)) | cells


def write(folder: Path, rows: list[dict[str, str]], images: str = ".", num_images: int | None = None) -> Path:
    rng = np.random.default_rng()
    (folder / images).mkdir(parents=True, exist_ok=True)
    for number in range(1, (len(rows) if num_images is None else num_images) + 1):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        (folder / images / f"{number:06d}.png").write_bytes(encode_png(pixels))
    with (folder / "ddi_metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def only_record(folder: Path, **cells: str) -> dict:
    (record,) = scan(DDI, write(folder, [row(1, **cells)])).records.to_pylist()
    return record


def reasons(folder: Path) -> dict[str | None, str]:
    return {line["image_id"]: line["reason"] for line in scan(DDI, folder).quarantined.to_pylist()}


def test_a_row_becomes_a_clinical_record_whose_id_is_no_number(tmp_path):
    record = only_record(tmp_path)
    assert (record["image_id"], record["file"], record["modality"]) == ("ddi_000001", "000001.png", "clinical")
    assert (record["source_label"], record["diagnosis"], record["malignant"]) == ("melanocytic-nevi", "nv", False)


@pytest.mark.parametrize(("pair", "tone"), [("12", "light"), ("34", "medium"), ("56", "dark"), ("56.0", "dark")])
def test_a_pair_of_skin_types_is_a_tone_and_no_type(tmp_path, pair, tone):
    record = only_record(tmp_path, skin_tone=pair)
    assert (record["skin_type"], record["skin_tone"], record["skin_type_origin"]) == (None, tone, "labelled")


def test_a_tone_that_is_not_known_has_no_origin(tmp_path):
    record = only_record(tmp_path, skin_tone="")
    assert (record["skin_type"], record["skin_tone"], record["skin_type_origin"]) == (None, None, None)


def test_every_image_is_on_the_test_side(tmp_path):
    folder = write(tmp_path, [row(1), row(2, skin_tone="12"), row(3, malignant="True", disease="melanoma")])
    assert scan(DDI, folder).records["official_split"].to_pylist() == ["test"] * 3


@pytest.mark.parametrize(
    ("disease", "diagnosis"),
    [
        *(("melanoma-in-situ", "mel"), ("nodular-melanoma-(nm)", "mel"), ("squamous-cell-carcinoma-in-situ", "scc")),
        *(("basal-cell-carcinoma-superficial", "bcc"), ("seborrheic-keratosis-irritated", "bkl"), ("blue-nevus", "nv")),
        *(("mycosis-fungoides", "cutaneous_lymphoma"), ("verruca-vulgaris", "wart"), ("tinea-pedis", "tinea")),
        *(("epidermal-nevus", None), ("nevus-lipomatosus-superficialis", None), ("leukemia-cutis", None)),
        *(("metastatic-carcinoma", None), ("sebaceous-carcinoma", None)),
    ],
)
def test_a_disease_has_the_diagnosis_that_it_is_a_case_of(disease, diagnosis):
    assert DDI.diagnoses[disease] == diagnosis
    assert len(DDI.diagnoses) == 78


def test_a_malignant_disease_without_a_diagnosis_is_still_malignant(tmp_path):
    record = only_record(tmp_path, disease="metastatic-carcinoma", malignant="True")
    assert (record["diagnosis"], record["malignant"]) == (None, True)


def test_what_cannot_be_read_or_found_is_named(tmp_path):
    rows = [row(1), row(2, disease="new-disease"), row(3, skin_tone="3"), row(4, malignant="maybe"), row(5)]
    rows.append(row(6, DDI_file="../000001.png"))
    found = reasons(write(tmp_path, rows, num_images=4))
    assert len(found) == 5
    assert "'new-disease' is none of the 78" in found["ddi_000002"]
    assert "skin_tone '3'" in found["ddi_000003"]
    assert "malignant 'maybe'" in found["ddi_000004"]
    assert found["ddi_000005"] == "the file is missing on disk"
    assert "not a safe name" in found["ddi_../000001"]


def test_nan_in_every_column_gives_a_record_of_unknowns(tmp_path):
    record = only_record(tmp_path, skin_tone="NaN", malignant="NaN", disease="NaN")
    assert (record["source_label"], record["diagnosis"], record["malignant"], record["skin_tone"]) == ("",) + 3 * (
        None,
    )


def test_a_row_without_a_file_and_a_file_without_a_row_are_both_said(tmp_path):
    found = reasons(write(tmp_path, [row(1), row(2, DDI_file="nan")]))
    assert "has no image_id" in found[None]
    assert "not in the table" in found["ddi_000002"]


def test_a_table_saved_by_a_spreadsheet_reads_the_same(tmp_path):
    folder = write(tmp_path, [row(1), row(2)], "images")
    before = scan(DDI, folder).records
    text = (folder / "ddi_metadata.csv").read_text()
    (folder / "ddi_metadata.csv").write_bytes(("\ufeff" + text.replace(",", ";")).replace("\r\n", "\n").encode())
    assert scan(DDI, folder).records == before


@pytest.mark.parametrize("images", [".", "images"])
def test_the_images_may_lie_beside_the_table_or_in_images_and_the_fingerprint_covers_both(tmp_path, images):
    folder = write(tmp_path, [row(1), row(2)], images)
    DDI.prepare(folder)
    assert scan(DDI, folder).records.num_rows == 2
    before = DDI.fingerprint(folder)
    (folder / images / "000009.png").write_bytes(b"another")
    assert DDI.fingerprint(folder) != before


def test_the_errors_say_where_is_looked_and_where_to_apply(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder.*ddi-dataset"):
        DDI.prepare(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no ddi_metadata\.csv.*ddi-dataset"):
        DDI.list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no image file.*ddi-dataset"):
        DDI.prepare(write(tmp_path, [row(1)], num_images=0))
