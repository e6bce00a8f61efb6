"""D7P (derm7pt) in the publisher's layout: `meta/meta.csv`, three index files and `images/` with subfolders.

A case is one lesion with a clinical and a dermoscopic image, scored by the 7-point checklist
(Kawahara, Daneshvar, Argenziano and Hamarneh 2019, https://derm.cs.sfu.ca).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath

from derm_pipeline.records import Diagnosis, Modality, Site, Split
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.layout import Layout, subfolders
from derm_pipeline.sources.listing import Candidate, Listing, find_images, pair, parse_mapped
from derm_pipeline.sources.tables import Row, read_table
from derm_pipeline.sources.words import SEXES, known_cells, known_or_none, label_or_blank, parse_site

HOMEPAGE = "https://derm.cs.sfu.ca"
INDEX_FILES = {Split.TRAIN: "train_indexes.csv", Split.VAL: "valid_indexes.csv", Split.TEST: "test_indexes.csv"}
"""Column `indexes`: numbers of the table's rows, from 0."""

LAYOUT = Layout(
    title="D7P (derm7pt)",
    expected=(
        "Expected there: meta/meta.csv (with train_indexes.csv, valid_indexes.csv and test_indexes.csv beside it) and "
        f"images/ with its subfolders, or all of it in release_v0/; given out on application at {HOMEPAGE}"
    ),
    tables=(("meta/meta.csv", "meta.csv", "release_v0/meta/meta.csv"),),
    extras=tuple((f"meta/{name}", name, f"release_v0/meta/{name}") for name in INDEX_FILES.values()),
    image_folders=("images", "release_v0/images"),
    archives=("release_v0",),
)

CONCEPTS = (
    *("pigment_network", "streaks", "pigmentation", "regression_structures", "dots_and_globules"),
    *("blue_whitish_veil", "vascular_structures", "seven_point_score"),
    *("level_of_diagnostic_difficulty", "elevation", "management"),
)
"""Columns kept as concepts, in the publisher's words: the seven criteria, their score, and what else is said."""

_VIEWS = {"clinic": Modality.CLINICAL, "derm": Modality.DERMOSCOPIC}
_COLUMNS = ("diagnosis", *CONCEPTS, "location", "sex", *_VIEWS)

SITES = {
    "abdomen": Site.ABDOMEN,
    "acral": Site.ACRAL,
    "back": Site.BACK,
    "buttocks": Site.BUTTOCKS,
    "chest": Site.CHEST,
    "genital areas": Site.GENITAL,
    "head neck": Site.HEAD_OR_NECK,
    "lower limbs": Site.LOWER_EXTREMITY,
    "upper limbs": Site.UPPER_EXTREMITY,
}

DIAGNOSES: dict[str, Diagnosis | None] = {
    "basal cell carcinoma": Diagnosis.BCC,
    "blue nevus": Diagnosis.NV,
    "clark nevus": Diagnosis.NV,
    "combined nevus": Diagnosis.NV,
    "congenital nevus": Diagnosis.NV,
    "dermal nevus": Diagnosis.NV,
    "recurrent nevus": Diagnosis.NV,
    "reed or spitz nevus": Diagnosis.NV,
    "dermatofibroma": Diagnosis.DF,
    "lentigo": None,
    "melanosis": None,
    "miscellaneous": None,
    "melanoma": Diagnosis.MEL,
    "melanoma (in situ)": Diagnosis.MEL,
    "melanoma (less than 0.76 mm)": Diagnosis.MEL,
    "melanoma (0.76 to 1.5 mm)": Diagnosis.MEL,
    "melanoma (more than 1.5 mm)": Diagnosis.MEL,
    "melanoma metastasis": Diagnosis.MEL,
    "seborrheic keratosis": Diagnosis.BKL,
    "vascular lesion": Diagnosis.VASC,
}


class D7p:
    """1,011 cases with 7-point criteria, each with a clinical and a dermoscopic image; ages are not given.

    An image's id is its path below images/ in lower case, without suffix and with "-" for "/" (NEL/NEL025.JPG is
    nel-nel025): table and disk differ in the case of letters, and are brought together without regard to it. Both
    images of a case have its number as their lesion (D7P_0001): `case_num`, or the row's place where there is none. An
    image that two cases name is kept once, with the first; the other is quarantined.
    """

    name = "d7p"
    title = LAYOUT.title
    licence = "research use; on application at derm.cs.sfu.ca"
    citation = (
        "Kawahara, Daneshvar, Argenziano and Hamarneh: Seven-point checklist and skin lesion classification using "
        "multitask multimodal neural nets. IEEE Journal of Biomedical and Health Informatics 23(2), 538-546 (2019), "
        "doi:10.1109/JBHI.2018.2824327"
    )
    homepage = HOMEPAGE
    diagnoses: Mapping[str, Diagnosis | None] = DIAGNOSES

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Unpack the publisher's archive; check that table and images are there; see `Source.prepare`."""
        LAYOUT.unpack(folder, on_progress)
        self.list_images(folder)
        if not _files(folder):
            raise FileNotFoundError(f"no image file in {folder / 'images'}. {LAYOUT.expected}")

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`; an index file that names a row twice or one that is not there is a ValueError."""
        (table,) = LAYOUT.find_tables(folder)
        rows = read_table(folder / table, _COLUMNS)
        splits = _official_splits(folder, table, len(rows))
        views = [view for number, row in enumerate(rows) for view in _views(number, row)]

        def candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
            return _candidate(cells, file, splits)

        return pair(self.name, views, _files(folder), candidate)

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return LAYOUT.fingerprint(folder, _image_folders(folder))


def _image_folders(folder: Path) -> list[str]:
    return list(chain.from_iterable(subfolders(folder, name) for name in LAYOUT.image_folders))


def _files(folder: Path) -> dict[str, list[str]]:
    """Image files by image_id."""
    found: dict[str, list[str]] = {}
    for name in chain.from_iterable(find_images(folder, _image_folders(folder)).values()):
        below = name.removeprefix("release_v0/").removeprefix("images/")
        found.setdefault(_image_id(below), []).append(name)
    return {image_id: sorted(names) for image_id, names in found.items()}


def _image_id(path: str) -> str:
    """A safe name for an image, from its path below images/."""
    return re.sub(r"[^a-z0-9_.\-]", "_", str(PurePosixPath(path).with_suffix("")).lower().replace("/", "-"))


def _views(number: int, row: Row) -> list[Row]:
    """The two images of a case as rows of their own."""
    case = _case(number, row.cells)
    views = []
    for view in _VIEWS:
        path = row.cells.get(view, "")
        bad_path = _problem_of_path(view, path)
        image_id = f"{case}-{view}" if bad_path else _image_id(path)
        own = {"image_id": image_id, "view": view, "lesion_id": case, "number": str(number)}
        views.append(Row(row.line, {**row.cells, **own}, row.problem or bad_path))
    return views


def _case(number: int, cells: Mapping[str, str]) -> str:
    if "case_num" not in cells:
        return f"D7P_{number + 1:04d}"
    case = known_or_none(cells["case_num"])
    if case is None:
        return f"D7P_row_{number + 1:04d}"  # not the number of another case
    case = re.sub(r"[^A-Za-z0-9_.\-]", "_", case.removesuffix(".0"))[:80]
    return f"D7P_{case.zfill(4)}"


def _problem_of_path(view: str, text: str) -> str | None:
    if known_or_none(text) is None:
        return f"the case names no image in the column {view}"
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text:
        return f"{view} {text[:80]!r} is not a path below images/"
    if not re.match(r"[A-Za-z0-9]", text) or len(text) > 120:
        return f"{view} {text[:80]!r} is not a safe name; allowed: up to 120 characters, first a letter or digit"
    return None


def _candidate(cells: Mapping[str, str], file: str | None, splits: Mapping[int, Split]) -> Candidate:
    site, concepts = parse_site("location", cells, SITES)
    return Candidate(
        image_id=cells["image_id"],
        file=file,
        source_label=label_or_blank(cells["diagnosis"], DIAGNOSES),
        diagnosis=parse_mapped(DIAGNOSES, "diagnosis", cells["diagnosis"]),
        modality=_VIEWS[cells["view"]],
        sex=parse_mapped(SEXES, "sex", cells["sex"]),
        site=site,
        lesion_id=cells["lesion_id"],
        official_split=splits.get(int(cells["number"])),
        concepts=concepts | known_cells(cells, CONCEPTS),
    )


def _official_splits(folder: Path, table: str, num_rows: int) -> dict[int, Split]:
    """The side of each row, by its number from 0, as far as the index files name it."""
    splits: dict[int, Split] = {}
    named_in: dict[int, str] = {}
    for split, name in zip(INDEX_FILES, LAYOUT.find_extras(folder), strict=True):
        for number, line in _indexes(folder, name):
            where = f"{folder / name}, line {line}: index {number}" if name else ""
            if number >= num_rows:
                raise ValueError(f"{where} is out of range; {table} has {num_rows:,} rows, numbered from 0")
            if number in named_in:
                raise ValueError(f"{where} is already in {named_in[number]}; a case is on one side, once")
            named_in[number], splits[number] = name or "", split
    return splits


def _indexes(folder: Path, name: str | None) -> Sequence[tuple[int, int]]:
    """Row numbers of an index file, each with its line."""
    found = []
    for row in read_table(folder / name, ("indexes",)) if name else ():
        text = row.cells.get("indexes", "")
        problem = row.problem or (None if re.fullmatch(r"[0-9]{1,9}", text) else f"{text[:80]!r} is no row number")
        if problem:
            raise ValueError(f"{folder / str(name)}, line {row.line}: {problem}")
        found.append((int(text), row.line))
    return found
