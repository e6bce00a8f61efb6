"""PAD-UFES-20: smartphone photographs of skin lesions from Brazil (Pacheco et al. 2020)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from derm_pipeline.records import Diagnosis, Modality, Site, SkinTypeOrigin
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.conditions import SKIN_TYPES
from derm_pipeline.sources.layout import Layout
from derm_pipeline.sources.listing import (
    UNKNOWN_WORDS,
    Candidate,
    Listing,
    pair,
    parse_age,
    parse_mapped,
)
from derm_pipeline.sources.tables import Row, read_table
from derm_pipeline.sources.words import SEXES, known_or_none

HOMEPAGE = "https://data.mendeley.com/datasets/zr7vgbcyr2/1"
_PARTS = ("images/imgs_part_1", "images/imgs_part_2", "images/imgs_part_3")

LAYOUT = Layout(
    title="PAD-UFES-20",
    expected=(
        "Expected there: metadata.csv and the archives or folders images/imgs_part_1 to images/imgs_part_3 (or all "
        f"images in images/), as published at {HOMEPAGE}"
    ),
    tables=(("metadata.csv",),),
    # An archive unpacked by hand may lie one level deeper.
    image_folders=(".", "images", *_PARTS, *(f"{part}/{part.rpartition('/')[2]}" for part in _PARTS)),
    archives=_PARTS,
)

COLUMNS = ("patient_id", "lesion_id", "age", "gender", "fitspatrick", "region", "diagnostic", "img_id")
CONCEPTS = ("diameter_1", "diameter_2", "itch", "grew", "hurt", "changed", "bleed", "elevation", "biopsed")
"""Columns kept as concepts, in the publisher's words; diameters are in millimetres, 0 and "UNK" are unknown."""

DIAGNOSES: Mapping[str, Diagnosis | None] = {
    "bcc": Diagnosis.BCC,
    "scc": Diagnosis.SCC,  # with Bowen's disease, which is SCC in situ
    "ack": Diagnosis.AK,
    "sek": Diagnosis.BKL,
    "mel": Diagnosis.MEL,
    "nev": Diagnosis.NV,
}
SITES = {
    "abdomen": Site.ABDOMEN,
    "arm": Site.UPPER_EXTREMITY,
    "back": Site.BACK,
    "chest": Site.CHEST,
    "ear": Site.EAR,
    "face": Site.FACE,
    "foot": Site.FOOT,
    "forearm": Site.UPPER_EXTREMITY,
    "hand": Site.HAND,
    "lip": Site.FACE,
    "neck": Site.NECK,
    "nose": Site.FACE,
    "scalp": Site.SCALP,
    "thigh": Site.LOWER_EXTREMITY,
}
"""The publisher's regions; one that is narrower than the site stands in the concept `site` too."""

_SKIN_TYPES = {**SKIN_TYPES, "0": None, "0.0": None}
_UNKNOWN = UNKNOWN_WORDS | {"unk", "0", "0.0"}


class PadUfes20:
    """2,298 photographs of 1,641 lesions of 1,373 patients; six diagnoses, the cancers all proven by biopsy.

    Patients' skin types, sexes and the lesions' diameters are known of about two thirds. SCC includes Bowen's disease
    (SCC in situ), as its publisher puts the two together.
    """

    name = "pad_ufes20"
    title = LAYOUT.title
    licence = "CC BY 4.0"
    citation = (
        "Pacheco, Lima, Salomão, Krohling, Biral, de Angelo et al.: PAD-UFES-20: A skin lesion dataset composed of "
        "patient data and clinical images collected from smartphones. Data in Brief 32, 106221 (2020), "
        "doi:10.1016/j.dib.2020.106221"
    )
    homepage = HOMEPAGE
    diagnoses: Mapping[str, Diagnosis | None] = DIAGNOSES

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Unpack the publisher's archives; check that the table and one image file are there; see `Source.prepare`."""
        _rows(folder)
        LAYOUT.unpack(folder, on_progress)
        LAYOUT.require_images(folder)

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        return pair(self.name, _rows(folder), LAYOUT.find_images(folder), _candidate)

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return LAYOUT.fingerprint(folder)


def _rows(folder: Path) -> list[Row]:
    (table,) = LAYOUT.find_tables(folder)
    rows = read_table(folder / table, COLUMNS)
    return [replace(row, cells={**row.cells, "image_id": _stem(row.cells.get("img_id", ""))}) for row in rows]


def _stem(name: str) -> str:
    """The name without its suffix; one with a slash stays so, and is refused as unsafe where the row is read."""
    return re.sub(r"\.(png|jpe?g)$", "", name, flags=re.IGNORECASE)


def _candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
    label = known_or_none(cells["diagnostic"]) or ""
    skin_type = parse_mapped(_SKIN_TYPES, "fitspatrick", cells["fitspatrick"])
    site = parse_mapped(SITES, "region", cells["region"])
    concepts = {name: cells[name] for name in CONCEPTS if cells.get(name, "").lower() not in _UNKNOWN}
    if site is not None and cells["region"].lower() != site:
        concepts["site"] = cells["region"].lower()
    return Candidate(
        image_id=cells["image_id"],
        file=file,
        source_label=label,
        diagnosis=parse_mapped(DIAGNOSES, "diagnostic", label),
        modality=Modality.CLINICAL,
        age_years=parse_age("age", cells["age"]),
        sex=parse_mapped(SEXES, "gender", cells["gender"]),
        site=site,
        skin_type=skin_type,
        skin_type_origin=SkinTypeOrigin.LABELLED if skin_type else None,
        lesion_id=known_or_none(cells["lesion_id"]),
        patient_id=known_or_none(cells["patient_id"]),
        concepts=concepts,
    )
