"""HAM10000 in the publisher's layout: a table and two folders of JPEG files (Tschandl, Rosendahl and Kittler 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from derm_pipeline.records import Diagnosis, Sex, Site
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.listing import (
    BadRowError,
    Candidate,
    Listing,
    find_images,
    fingerprint_files,
    pair,
    parse_age,
    parse_word_or_none,
    read_table,
)

TABLES = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
"""Names under which the table is distributed; one of them is expected."""

IMAGE_FOLDERS = (".", "images", "HAM10000_images_part_1", "HAM10000_images_part_2")
"""Where images are looked for. Any other folder (segmentations, other resolutions) is passed over."""

COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
CONCEPTS = ("dx_type", "dataset")
"""Columns kept as concepts, in the publisher's words; `dataset` is only in newer tables."""


DIAGNOSES = {word: Diagnosis(word) for word in ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")}


class Ham10000:
    """10,015 dermoscopic images of seven diagnoses; ages, sexes and sites partly unknown, skin types not given."""

    name = "ham10000"
    title = "HAM10000"
    licence = "CC BY-NC 4.0"
    citation = (
        "Tschandl, Rosendahl and Kittler: The HAM10000 dataset, a large collection of multi-source dermatoscopic "
        "images of common pigmented skin lesions. Scientific Data 5, 180161 (2018), doi:10.1038/sdata.2018.161"
    )
    diagnoses: Mapping[str, Diagnosis | None] = DIAGNOSES
    homepage = "https://doi.org/10.7910/DVN/DBW86T"

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Check that the table and at least one image file are there; see `Source.prepare`."""
        read_table(folder / self._table(folder), COLUMNS)
        if not find_images(folder, IMAGE_FOLDERS):
            raise FileNotFoundError(f"no image file in {folder}. {self._layout()}")

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        rows = read_table(folder / self._table(folder), COLUMNS)
        return pair(self.name, rows, find_images(folder, IMAGE_FOLDERS), _candidate)

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return fingerprint_files(folder, [self._table(folder)], IMAGE_FOLDERS)

    def _table(self, folder: Path) -> str:
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.title} is looked for in {folder}, which is not a folder. {self._layout()}")
        found = [name for name in TABLES if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no {TABLES[0]} in {folder}. {self._layout()}")
        if len(found) > 1:
            raise ValueError(f"{folder} has several tables: {', '.join(found)}; keep the one that is meant")
        return found[0]

    def _layout(self) -> str:
        return (
            f"Expected there: {TABLES[0]} and the images in HAM10000_images_part_1/ and HAM10000_images_part_2/ "
            f"(or images/), as published at {self.homepage}"
        )


def _candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
    return Candidate(
        image_id=cells["image_id"],
        file=file,
        source_label=cells["dx"],
        diagnosis=_diagnosis(cells["dx"]),
        age_years=parse_age("age", cells["age"]),
        sex=parse_word_or_none(Sex, "sex", cells["sex"]),
        site=parse_word_or_none(Site, "localization", cells["localization"]),
        lesion_id=cells["lesion_id"] or None,
        concepts={name: cells[name] for name in CONCEPTS if cells.get(name)},
    )


def _diagnosis(text: str) -> Diagnosis:
    if text not in DIAGNOSES:
        raise BadRowError(f"dx {text!r} is outside the vocabulary; allowed: {', '.join(DIAGNOSES)}")
    return DIAGNOSES[text]
