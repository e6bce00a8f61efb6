"""SCIN: photographs that people in the United States gave of their own skin conditions (Ward et al. 2024).

Two tables are joined by case_id, which is text: it looks like a number, and one that was rounded names another case.
Columns are those of the publisher's `dataset_schema.md`; what was said of condition and skin type is in `scin_labels`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from derm_pipeline.records import Diagnosis, Modality, Quarantined, Sex, Site, SkinTypeOrigin
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.conditions import find_diagnosis
from derm_pipeline.sources.layout import Layout
from derm_pipeline.sources.listing import BadRowError, Candidate, Listing, pair, parse_mapped
from derm_pipeline.sources.scin_labels import DIAGNOSES, WEIGHTS, parse_skin_type, read_labels
from derm_pipeline.sources.tables import Row, read_table
from derm_pipeline.sources.words import SEXES, known_cells, known_or_none

HOMEPAGE = "https://github.com/google-research-datasets/scin"

LAYOUT = Layout(
    title="SCIN (Skin Condition Image Network)",
    expected=(
        "Expected there, or in dataset/: scin_cases.csv, scin_labels.csv and the images in images/, as in the bucket "
        f"dx-scin-public-data; see {HOMEPAGE}"
    ),
    tables=(
        ("dataset/scin_cases.csv", "scin_cases.csv"),
        ("dataset/scin_labels.csv", "scin_labels.csv"),
    ),
    image_folders=(".", "images", "dataset", "dataset/images"),
)

IMAGES = (1, 2, 3)
"""A case has up to three images, each with a path and a shot type of that number."""

# "first-last year"; whom the publisher calls 80 or above may be of any age above.
_AGE_RANGES = {
    "age_18_to_29": "18-29",
    "age_30_to_39": "30-39",
    "age_40_to_49": "40-49",
    "age_50_to_59": "50-59",
    "age_60_to_69": "60-69",
    "age_70_to_79": "70-79",
    "age_80_or_above": "80-120",
    "age_unknown": None,
}
_SEXES: dict[str, Sex | None] = {**SEXES, "other_or_unspecified": None, "other": None, "prefer_not_to_say": None}
_SITES: dict[str, Site | None] = {
    "head_or_neck": Site.HEAD_OR_NECK,
    "arm": Site.UPPER_EXTREMITY,
    "palm": Site.HAND,
    "back_of_hand": Site.HAND,
    "torso_front": Site.FRONT_OF_TRUNK,
    "torso_back": Site.BACK,
    "genitalia_or_groin": Site.GENITAL,
    "buttocks": Site.BUTTOCKS,
    "leg": Site.LOWER_EXTREMITY,
    "foot_top_or_side": Site.FOOT,
    "foot_sole": Site.FOOT,
    "other": None,
}
_BOOLEANS = {**dict.fromkeys(("yes", "true", "1", "1.0"), True), **dict.fromkeys(("no", "false", "0", "0.0"), False)}
_WORDS_OF = ("textures", "body_parts", "condition_symptoms", "other_symptoms")
"""Groups of yes-or-no columns that become one concept each: the names of those that say yes, joined by commas."""
_OWN_SKIN_TYPE = "fitzpatrick_skin_type"
_CONCEPTS = ("related_category", "condition_duration", "shot_type", _OWN_SKIN_TYPE)
_NO_ANSWER = {"prefer_not_to_answer", "texture_unspecified", "unspecified"}
_ROUNDED = re.compile(r"-?[0-9]+(\.[0-9]*(e[+-]?[0-9]+)?|e[+-]?[0-9]+)", re.IGNORECASE)


class Scin:
    """10,407 photographs of 5,033 cases; a case is one contribution of one person, with up to three images.

    The label is the condition to which dermatologists gave most weight; of several with the same weight the first in
    the publisher's order, and the tie is said in the concept `label_tie`. What people say of their race and ethnicity
    is a group and never the label. A condition outside `diagnoses` is no error, since the publisher's list is open: it
    stands in source_label, without a diagnosis. An image_id is `scin_` and the file's name without its suffix.

    lesion_id is the case, and patient_id too, but for cases that hold the same image (the publisher knows of 15 images
    that occur 42 times): they have one patient_id, so that the rest of these cases stays together. The image itself is
    a record of the first of them.
    """

    name = "scin"
    title = LAYOUT.title
    licence = "SCIN Data Use License"
    citation = (
        "Ward, Li, Wang, Lakshminarasimhan, Carrick et al.: Creating an Empirical Dermatology Dataset Through "
        "Crowdsourcing With Web Search Advertisements. JAMA Network Open 7, e2446615 (2024), "
        "doi:10.1001/jamanetworkopen.2024.46615"
    )
    homepage = HOMEPAGE
    diagnoses: Mapping[str, Diagnosis | None] = DIAGNOSES

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Check that both tables and at least one image file are there; see `Source.prepare`."""
        _read_tables(folder)
        LAYOUT.require_images(folder)

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        case_rows, label_rows = _read_tables(folder)
        cases, bad_cases = _by_case(case_rows, "scin_cases.csv")
        labels, bad_labels = _by_case(label_rows, "scin_labels.csv")
        images = [image for row in cases.values() for image in _images(row)]
        patients = _join_by_image(images)
        files = {f"scin_{stem}": names for stem, names in LAYOUT.find_images(folder).items()}

        def candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
            case_id = cells["case_id"]
            return _candidate(cells, file, labels.get(case_id), patients[case_id])

        listing = pair(self.name, images, files, candidate)
        bad = (*bad_cases, *bad_labels, *_without_case(labels, cases))
        return Listing(listing.candidates, (*listing.quarantined, *bad))

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return LAYOUT.fingerprint(folder)


def _read_tables(folder: Path) -> tuple[list[Row], list[Row]]:
    cases, labels = LAYOUT.find_tables(folder)
    return read_table(folder / cases, ("case_id", "image_1_path")), read_table(folder / labels, ("case_id", WEIGHTS))


def _by_case(rows: Sequence[Row], table: str) -> tuple[dict[str, Row], list[Quarantined]]:
    """The rows by case_id, and those that have none, one that is not to be trusted, or that of an earlier row."""
    by_case: dict[str, Row] = {}
    bad = []
    for row in rows:
        case_id = row.cells.get("case_id", "")
        if reason := _why_no_case_id(case_id, by_case):
            bad.append(_quarantine(f"{table}, line {row.line}: {reason}"))
        else:
            by_case[case_id] = row
    return by_case, bad


def _why_no_case_id(case_id: str, earlier: Mapping[str, Row]) -> str | None:
    if known_or_none(case_id) is None:
        return "the row has no case_id"
    if _ROUNDED.fullmatch(case_id):
        return f"case_id {case_id[:80]!r} was rounded by a program that took it for a number; use the publisher's file"
    if case_id in earlier:
        return f"case {case_id[:80]!r} is already in line {earlier[case_id].line}, which is kept"
    return None


def _without_case(labels: Mapping[str, Row], cases: Mapping[str, Row]) -> Iterator[Quarantined]:
    for case_id, row in labels.items():
        if case_id not in cases:
            yield _quarantine(f"scin_labels.csv, line {row.line}: case {case_id[:80]!r} is not in scin_cases.csv")


def _quarantine(reason: str) -> Quarantined:
    return Quarantined(source=Scin.name, image_id=None, file=None, reason=reason)


def _images(row: Row) -> Iterator[Row]:
    """A row for each image of a case; for a case without one, one row that says so."""
    paths = [(number, row.cells.get(f"image_{number}_path", "")) for number in IMAGES]
    known = [(number, path) for number, path in paths if known_or_none(path) is not None]
    if not known:
        yield replace(row, problem=row.problem or "the case has no image")
    for number, path in known:
        stem = PurePosixPath(path).stem
        shot = row.cells.get(f"image_{number}_shot_type", "")
        yield replace(row, cells={**row.cells, "image_id": f"scin_{stem}", "image_path": path, "shot_type": shot})


def _join_by_image(images: Sequence[Row]) -> dict[str, str]:
    """For each case the case that stands for all those that it shares images with, directly or through others."""
    stands_for = {image.cells["case_id"]: image.cells["case_id"] for image in images}

    def find(case_id: str) -> str:
        while stands_for[case_id] != case_id:
            case_id = stands_for[case_id]
        return case_id

    first_with: dict[str, str] = {}
    for image in images:
        case_id, image_id = image.cells["case_id"], image.cells.get("image_id")
        if image_id is not None:
            stands_for[find(case_id)] = find(first_with.setdefault(image_id, case_id))
    return {case_id: find(case_id) for case_id in stands_for}


def _candidate(cells: Mapping[str, str], file: str | None, labels: Row | None, patient_id: str) -> Candidate:
    path = PurePosixPath(cells["image_path"])
    if path.is_absolute() or ".." in path.parts:
        raise BadRowError(f"the path {cells['image_path'][:80]!r} leaves the source's folder")
    said = read_labels(labels)
    own_skin_type = parse_skin_type(_OWN_SKIN_TYPE, cells.get(_OWN_SKIN_TYPE, ""))
    skin_type, origin = said.skin_type, SkinTypeOrigin.LABELLED
    if skin_type is None:
        skin_type, origin = own_skin_type, SkinTypeOrigin.SELF_REPORTED
    groups = {group: ",".join(names) for group in _WORDS_OF if (names := _said_yes(cells, group))}
    return Candidate(
        image_id=cells["image_id"],
        file=file,
        source_label=said.label,
        diagnosis=find_diagnosis(said.label),
        modality=Modality.CLINICAL,
        age_range=parse_mapped(_AGE_RANGES, "age_group", cells.get("age_group", "")),
        sex=parse_mapped(_SEXES, "sex_at_birth", cells.get("sex_at_birth", "")),
        site=_site(cells),
        skin_type=skin_type,
        skin_type_origin=origin if skin_type else None,
        ethnicity=",".join(_said_yes(cells, "race_ethnicity")) or None,
        lesion_id=cells["case_id"],
        patient_id=patient_id,
        concepts={**said.concepts, **groups, **known_cells(cells, _CONCEPTS)},
    )


def _said_yes(cells: Mapping[str, str], group: str) -> list[str]:
    """The columns of a group that say yes, in the table's order and without the group's name."""
    columns = [name for name in cells if name.startswith(f"{group}_")]
    said = [name.removeprefix(f"{group}_") for name in columns if parse_mapped(_BOOLEANS, name, cells[name])]
    return [name for name in said if name not in _NO_ANSWER]


def _site(cells: Mapping[str, str]) -> Site | None:
    """The site of the one body part that is said; of several, an image shows one and nobody says which."""
    parts = _said_yes(cells, "body_parts")
    return _SITES.get(parts[0]) if len(parts) == 1 else None
