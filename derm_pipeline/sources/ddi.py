"""Diverse Dermatology Images (DDI) of Stanford: biopsied lesions, light to dark skin (Daneshjou et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from derm_pipeline.records import Diagnosis, Modality, SkinTone, SkinTypeOrigin, Split
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.conditions import diagnoses_of
from derm_pipeline.sources.layout import Layout
from derm_pipeline.sources.listing import BadRowError, Candidate, Listing, pair, parse_mapped
from derm_pipeline.sources.tables import Row, read_table
from derm_pipeline.sources.words import known_or_none

HOMEPAGE = "https://ddi-dataset.github.io/"

LAYOUT = Layout(
    title="Diverse Dermatology Images (DDI)",
    expected=(
        "Expected there: ddi_metadata.csv and the images (000001.png ...) beside it or in images/, as Stanford gives "
        f"them to those who agree to its terms: {HOMEPAGE}"
    ),
    tables=(("ddi_metadata.csv",),),
    image_folders=(".", "images"),
)

COLUMNS = ("DDI_file", "skin_tone", "malignant", "disease")

_LABELS = """
abrasions-ulcerations-and-physical-injuries abscess acne-cystic acquired-digital-fibrokeratoma acral-melanotic-macule
acrochordon actinic-keratosis angioleiomyoma angioma arteriovenous-hemangioma atypical-spindle-cell-nevus-of-reed
basal-cell-carcinoma basal-cell-carcinoma-nodular basal-cell-carcinoma-superficial benign-keratosis
blastic-plasmacytoid-dendritic-cell-neoplasm blue-nevus cellular-neurothekeoma chondroid-syringoma
clear-cell-acanthoma coccidioidomycosis condyloma-accuminatum dermatofibroma dermatomyositis dysplastic-nevus
eccrine-poroma eczema-spongiotic-dermatitis epidermal-cyst epidermal-nevus fibrous-papule focal-acral-hyperkeratosis
folliculitis foreign-body-granuloma glomangioma graft-vs-host-disease hematoma hyperpigmentation
inverted-follicular-keratosis kaposi-sarcoma keloid leukemia-cutis lichenoid-keratosis lipoma
lymphocytic-infiltrations melanocytic-nevi melanoma melanoma-acral-lentiginous melanoma-in-situ metastatic-carcinoma
molluscum-contagiosum morphea mycosis-fungoides neurofibroma neuroma nevus-lipomatosus-superficialis
nodular-melanoma-(nm) onychomycosis pigmented-spindle-cell-nevus-of-reed prurigo-nodularis pyogenic-granuloma
reactive-lymphoid-hyperplasia scar sebaceous-carcinoma seborrheic-keratosis seborrheic-keratosis-irritated
solar-lentigo squamous-cell-carcinoma squamous-cell-carcinoma-in-situ squamous-cell-carcinoma-keratoacanthoma
subcutaneous-t-cell-lymphoma syringocystadenoma-papilliferum tinea-pedis trichilemmoma trichofolliculoma
verruca-vulgaris verruciform-xanthoma wart xanthogranuloma
"""
DIAGNOSES = diagnoses_of(_LABELS.split())
"""The 78 labels and what each means here."""

# Pairs of Fitzpatrick types: 12 is I-II. A pair is a tone and not a type.
_TONES = {"12": SkinTone.LIGHT, "34": SkinTone.MEDIUM, "56": SkinTone.DARK}
_BOOLEANS = {"true": True, "false": False}


class Ddi:
    """656 photographs of lesions with a pathologist's diagnosis; skin tones in pairs of types, no patients given.

    All of it is on the test side: its authors curated it to evaluate models across skin tones, and who trains on it has
    nothing left to show that with. An image_id is `ddi_` and the file's name without its suffix.
    """

    name = "ddi"
    title = LAYOUT.title
    licence = "Stanford University Dataset Research Use Agreement"
    citation = (
        "Daneshjou, Vodrahalli, Novoa, Jenkins, Liang, Rotemberg et al.: Disparities in dermatology AI performance on "
        "a diverse, curated clinical image set. Science Advances 8, eabq6147 (2022), doi:10.1126/sciadv.abq6147"
    )
    homepage = HOMEPAGE
    diagnoses: Mapping[str, Diagnosis | None] = DIAGNOSES

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Check that the table and at least one image file are there; see `Source.prepare`."""
        self._rows(folder)
        LAYOUT.require_images(folder)

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        files = {"ddi_" + stem: names for stem, names in LAYOUT.find_images(folder).items()}
        return pair(self.name, self._rows(folder), files, self._candidate)

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return LAYOUT.fingerprint(folder)

    def _rows(self, folder: Path) -> list[Row]:
        (table,) = LAYOUT.find_tables(folder)
        rows = read_table(folder / table, COLUMNS)
        return [replace(row, cells={**row.cells, "image_id": _image_id(row.cells.get("DDI_file", ""))}) for row in rows]

    def _candidate(self, cells: Mapping[str, str], file: str | None) -> Candidate:
        label = known_or_none(cells["disease"]) or ""
        if label and label.lower() not in self.diagnoses:
            raise BadRowError(f"disease {label[:80]!r} is none of the {len(self.diagnoses)} of {self.title}")
        tone = parse_mapped(_TONES, "skin_tone", cells["skin_tone"].removesuffix(".0"))
        return Candidate(
            image_id=cells["image_id"],
            file=file,
            source_label=label,
            diagnosis=self.diagnoses.get(label.lower()),
            modality=Modality.CLINICAL,
            malignant=parse_mapped(_BOOLEANS, "malignant", cells["malignant"]),
            skin_tone=tone,
            skin_type_origin=SkinTypeOrigin.LABELLED if tone else None,
            official_split=Split.TEST,
        )


def _image_id(name: str) -> str:
    """Empty for no name; a name with a slash keeps it, and is refused as unsafe where the row is read."""
    return "ddi_" + re.sub(r"\.(png|jpe?g)$", "", name, flags=re.IGNORECASE) if known_or_none(name) else ""
