"""HAM10000 in the publisher's layout: a table and two folders of JPEG files (Tschandl, Rosendahl and Kittler 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from derm_pipeline.images import read_image
from derm_pipeline.records import Diagnosis, Site
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.layout import Layout
from derm_pipeline.sources.listing import (
    BadRowError,
    Candidate,
    Listing,
    find_images,
    pair,
    parse_age,
    parse_mapped,
    parse_word_or_none,
)
from derm_pipeline.sources.tables import read_table
from derm_pipeline.sources.words import SEXES, known_cells, known_or_none

MASK_FOLDER = "HAM10000_segmentations_lesion_tschandl"
"""Lesion masks, `<image_id>_segmentation.png`, drawn at 600x450 for every image; the folder may be absent."""

HOMEPAGE = "https://doi.org/10.7910/DVN/DBW86T"
LAYOUT = Layout(
    title="HAM10000",
    expected=(
        "Expected there: HAM10000_metadata.csv and the images in HAM10000_images_part_1/ and HAM10000_images_part_2/ "
        f"(or images/), or their zip archives, as published at {HOMEPAGE}"
    ),
    tables=(("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab"),),
    image_folders=(".", "images", "HAM10000_images_part_1", "HAM10000_images_part_2"),
    side_folders=(MASK_FOLDER,),
    archives=("HAM10000_images_part_1", "HAM10000_images_part_2", MASK_FOLDER),
)

COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
CONCEPTS = ("dx_type", "dataset")
"""Columns kept as concepts, in the publisher's words; `dataset` is only in newer tables."""

DIAGNOSES = {word: Diagnosis(word) for word in ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")}


class Ham10000:
    """10,015 dermoscopic images of seven diagnoses; ages, sexes and sites partly unknown, skin types not given.

    An image with a lesion mask has the mask's path, relative to the source's folder, as the concept `lesion_mask`.
    """

    name = "ham10000"
    title = LAYOUT.title
    licence = "CC BY-NC 4.0"
    citation = (
        "Tschandl, Rosendahl and Kittler: The HAM10000 dataset, a large collection of multi-source dermatoscopic "
        "images of common pigmented skin lesions. Scientific Data 5, 180161 (2018), doi:10.1038/sdata.2018.161"
    )
    diagnoses: Mapping[str, Diagnosis | None] = DIAGNOSES
    homepage = HOMEPAGE

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Unpack the publisher's archives; check that table and images are there; see `Source.prepare`."""
        LAYOUT.unpack(folder, on_progress)
        (table,) = LAYOUT.find_tables(folder)
        read_table(folder / table, COLUMNS)
        LAYOUT.require_images(folder)

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        (table,) = LAYOUT.find_tables(folder)
        rows = read_table(folder / table, COLUMNS)
        masks = find_images(folder, [MASK_FOLDER])
        return pair(self.name, rows, LAYOUT.find_images(folder), partial(_candidate, masks))

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return LAYOUT.fingerprint(folder)


def read_lesion_mask(path: Path) -> npt.NDArray[np.bool_]:
    """Where the lesion is, (h, w), in the mask's own size, which need not be that of the image.

    White is lesion. The file's mode does not matter: some masks are in palette mode with white as index 0, so that
    their indexes are the opposite of the mask; one that holds only 0 and 1 is taken as such.

    Raises:
        BadImageError: missing, not a JPEG or PNG, too many pixels, truncated or broken.
    """
    brightness = read_image(path).max(axis=2)
    return np.asarray(brightness >= (128 if brightness.max() > 1 else 1))


def _candidate(masks: Mapping[str, list[str]], cells: Mapping[str, str], file: str | None) -> Candidate:
    concepts = known_cells(cells, CONCEPTS)
    if found := masks.get(f"{cells['image_id']}_segmentation"):
        concepts["lesion_mask"] = found[0]
    return Candidate(
        image_id=cells["image_id"],
        file=file,
        source_label=cells["dx"],
        diagnosis=_diagnosis(cells["dx"]),
        age_years=parse_age("age", cells["age"]),
        sex=parse_mapped(SEXES, "sex", cells["sex"]),
        site=parse_word_or_none(Site, "localization", cells["localization"].lower()),
        lesion_id=known_or_none(cells["lesion_id"]),
        concepts=concepts,
    )


def _diagnosis(text: str) -> Diagnosis:
    if text.lower() not in DIAGNOSES:
        raise BadRowError(f"dx {text!r} is outside the vocabulary; allowed: {', '.join(DIAGNOSES)}")
    return DIAGNOSES[text.lower()]
