"""The ISIC challenges in the publisher's layout: the 2018 Task 3 test set, 2019 training set, 2020 training set.

Pages: https://challenge.isic-archive.com/data/#2018, #2019 and #2020.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from derm_pipeline.records import Diagnosis, Quarantined, Site, Split
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.layout import Layout
from derm_pipeline.sources.listing import BadRowError, Candidate, Listing, pair, parse_age, parse_mapped
from derm_pipeline.sources.tables import Row, read_table
from derm_pipeline.sources.words import SEXES, known_or_none, label_or_blank, parse_site

SITES = {
    "anterior torso": Site.FRONT_OF_TRUNK,
    "head/neck": Site.HEAD_OR_NECK,
    "lateral torso": Site.SIDE_OF_TRUNK,
    "lower extremity": Site.LOWER_EXTREMITY,
    "oral/genital": Site.ORAL_OR_GENITAL,
    "palms/soles": Site.PALM_OR_SOLE,
    "posterior torso": Site.BACK,
    "torso": Site.TRUNK,
    "upper extremity": Site.UPPER_EXTREMITY,
}
"""The archive's words for a body site. A word that is not the site's own value stands in the concept `site` as well."""

TSCHANDL = "Tschandl, Rosendahl and Kittler: The HAM10000 dataset. Scientific Data 5, 180161 (2018)"


class _Challenge(ABC):
    """What the three have in common."""

    licence = "CC BY-NC 4.0"
    layout: Layout

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Unpack the publisher's archives; check that tables and images are there; see `Source.prepare`."""
        self.layout.unpack(folder, on_progress)
        self.list_images(folder)
        self.layout.require_images(folder)

    @abstractmethod
    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return self.layout.fingerprint(folder)


class Isic2018Test(_Challenge):
    """The official test set of ISIC 2018 Task 3: 1,512 dermoscopic images of HAM10000's seven diagnoses, all `test`.

    Age, sex and site come from the ISIC 2019 test metadata where that table lies in the folder too; an image that it
    does not name keeps them unknown, and its rows of other images are not this source's. Lesions are not published.
    """

    name = "isic2018_test"
    title = "ISIC 2018 Task 3 test set"
    citation = (
        "Codella et al.: Skin lesion analysis toward melanoma detection 2018: a challenge hosted by the International "
        f"Skin Imaging Collaboration (ISIC). arXiv:1902.03368 (2019); {TSCHANDL}, doi:10.1038/sdata.2018.161"
    )
    homepage = "https://challenge.isic-archive.com/data/#2018"
    diagnoses: Mapping[str, Diagnosis | None] = {
        word: Diagnosis(word) for word in ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
    }
    layout = Layout(
        title=title,
        expected=(
            "Expected there: ISIC2018_Task3_Test_GroundTruth.csv (or in ISIC2018_Task3_Test_GroundTruth/) and the "
            "images in ISIC2018_Task3_Test_Input/, or the zip archives of both, and if wanted "
            f"ISIC_2019_Test_Metadata.csv, as published at {homepage}"
        ),
        tables=(
            (
                "ISIC2018_Task3_Test_GroundTruth.csv",
                "ISIC2018_Task3_Test_GroundTruth/ISIC2018_Task3_Test_GroundTruth.csv",
            ),
        ),
        extras=(("ISIC_2019_Test_Metadata.csv",),),
        image_folders=(".", "images", "ISIC2018_Task3_Test_Input"),
        archives=("ISIC2018_Task3_Test_GroundTruth", "ISIC2018_Task3_Test_Input"),
    )

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        (table,), (extra,) = self.layout.find_tables(folder), self.layout.find_extras(folder)
        rows = read_table(folder / table, _columns(self.diagnoses))
        known = _Metadata.read(self.name, folder, extra, ("image", "age_approx", "anatom_site_general", "sex"))

        def candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
            return _one_hot_candidate(cells, file, self.diagnoses, known, Split.TEST)

        listing = pair(self.name, rows, self.layout.find_images(folder), candidate, id_column="image")
        return Listing(listing.candidates, (*listing.quarantined, *known.quarantined))


class Isic2019(_Challenge):
    """The training set of ISIC 2019: 25,331 dermoscopic images of eight diagnoses, all of HAM10000 among them.

    AK and SCC are told apart here and stay so: HAM10000's akiec holds both. UNK gives no diagnosis. An image keeps its
    name, with `_downsampled` where it has that. An image without a row in the metadata keeps age, sex, site and lesion
    unknown; one without a row in the ground truth is quarantined.
    """

    name = "isic2019"
    title = "ISIC 2019 training set"
    citation = (
        f"{TSCHANDL}, doi:10.1038/sdata.2018.161; Codella et al.: Skin lesion analysis toward melanoma detection: a "
        "challenge at the 2017 ISBI, hosted by ISIC. arXiv:1710.05006 (2018); Combalia et al.: BCN20000: dermoscopic "
        "lesions in the wild. arXiv:1908.02288 (2019)"
    )
    homepage = "https://challenge.isic-archive.com/data/#2019"
    diagnoses: Mapping[str, Diagnosis | None] = {
        word: Diagnosis(word) for word in ("mel", "nv", "bcc", "ak", "bkl", "df", "vasc", "scc")
    } | {"unk": None}
    layout = Layout(
        title=title,
        expected=(
            "Expected there: ISIC_2019_Training_GroundTruth.csv, ISIC_2019_Training_Metadata.csv and the images in "
            f"ISIC_2019_Training_Input/ (or its zip archive), as published at {homepage}"
        ),
        tables=(("ISIC_2019_Training_GroundTruth.csv",), ("ISIC_2019_Training_Metadata.csv",)),
        image_folders=(".", "images", "ISIC_2019_Training_Input"),
        archives=("ISIC_2019_Training_Input",),
    )

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        truth, metadata = self.layout.find_tables(folder)
        rows = read_table(folder / truth, _columns(self.diagnoses))
        columns = ("image", "age_approx", "anatom_site_general", "lesion_id", "sex")
        known = _Metadata.read(self.name, folder, metadata, columns)
        rows += known.without({row.cells.get("image", "") for row in rows}, truth)

        def candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
            return _one_hot_candidate(cells, file, self.diagnoses, known, None)

        listing = pair(self.name, rows, self.layout.find_images(folder), candidate, id_column="image")
        return Listing(listing.candidates, (*listing.quarantined, *known.quarantined))


class Isic2020(_Challenge):
    """The training set of ISIC 2020: 33,126 dermoscopic images of 2,056 patients; 584 melanomas, most others unnamed.

    Whether a lesion is malignant is what `benign_malignant` and `target` say, not what follows from the diagnosis. The
    images that the publisher's list of duplicates pairs with one are its concept `publisher_duplicate`, and share a
    lesion where the table names none; pairs of images that the table does not hold are not this source's.
    """

    name = "isic2020"
    title = "ISIC 2020 training set"
    citation = (
        "Rotemberg et al.: A patient-centric dataset of images and metadata for identifying melanomas using clinical "
        "context. Scientific Data 8, 34 (2021), doi:10.1038/s41597-021-00815-z"
    )
    homepage = "https://doi.org/10.34970/2020-ds01"
    diagnoses: Mapping[str, Diagnosis | None] = {
        "nevus": Diagnosis.NV,
        "melanoma": Diagnosis.MEL,
        "seborrheic keratosis": Diagnosis.BKL,
        "lichenoid keratosis": Diagnosis.BKL,
        "solar lentigo": Diagnosis.BKL,
        "lentigo nos": None,
        "cafe-au-lait macule": None,
        "atypical melanocytic proliferation": None,
        "unknown": None,
    }
    layout = Layout(
        title=title,
        expected=(
            "Expected there: ISIC_2020_Training_GroundTruth.csv or train.csv, and the images in train/ or "
            f"ISIC_2020_Training_JPEG/ (or its zip archive), as published at {homepage}"
        ),
        tables=(("train.csv", "ISIC_2020_Training_GroundTruth.csv", "ISIC_2020_Training_GroundTruth_v2.csv"),),
        extras=(("ISIC_2020_Training_Duplicates.csv",),),
        image_folders=(
            *(".", "images", "train", "jpeg/train"),  # the last as Kaggle has it
            *("ISIC_2020_Training_JPEG", "ISIC_2020_Training_JPEG/train"),
        ),
        archives=("ISIC_2020_Training_JPEG",),
    )

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        (table,), (extra,) = self.layout.find_tables(folder), self.layout.find_extras(folder)
        columns = ("image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge", "diagnosis")
        rows = read_table(folder / table, (*columns, "benign_malignant", "target"))
        twins, bad_pairs = _read_twins(self.name, folder, extra)

        def candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
            site, concepts = parse_site("anatom_site_general_challenge", cells, SITES)
            if cells["image_name"] in twins:
                concepts["publisher_duplicate"] = ", ".join(sorted(twins[cells["image_name"]]))
            return Candidate(
                image_id=cells["image_name"],
                file=file,
                source_label=label_or_blank(cells["diagnosis"], self.diagnoses),
                diagnosis=parse_mapped(self.diagnoses, "diagnosis", cells["diagnosis"]),
                malignant=_malignant(cells),
                age_years=parse_age("age_approx", cells["age_approx"]),
                sex=parse_mapped(SEXES, "sex", cells["sex"]),
                site=site,
                lesion_id=known_or_none(cells.get("lesion_id", "")) or _shared_lesion(cells["image_name"], twins),
                patient_id=known_or_none(cells["patient_id"]),
                concepts=concepts,
            )

        listing = pair(self.name, rows, self.layout.find_images(folder), candidate, id_column="image_name")
        return Listing(listing.candidates, (*listing.quarantined, *bad_pairs))


@dataclass(frozen=True)
class _Metadata:
    """A table of what is known of the images beside their diagnosis."""

    table: str
    rows: Mapping[str, Row]
    """By image."""
    quarantined: Sequence[Quarantined]
    """Rows that belong to no image, or to one that had a row already."""

    @classmethod
    def read(cls, source: str, folder: Path, table: str | None, columns: Sequence[str]) -> _Metadata:
        found: dict[str, Row] = {}
        quarantined = []
        for row in read_table(folder / table, columns) if table else ():
            image = known_or_none(row.cells.get("image", ""))
            if image and image not in found:
                found[image] = row
                continue
            reason = f"image {image} is already in line {found[image].line}, which is kept" if image else "no image"
            reason = f"{table} line {row.line}: {reason}"
            quarantined.append(Quarantined(source=source, image_id=image, file=None, reason=reason))
        return cls(table or "", found, quarantined)

    def cells(self, image: str) -> Mapping[str, str]:
        """What the table says of an image; nothing of one that it does not hold.

        Raises:
            BadRowError: its row cannot be read, so that even its lesion may be wrong.
        """
        row = self.rows.get(image)
        if row is None:
            return {}
        if row.problem:
            raise BadRowError(f"{self.table} line {row.line}: {row.problem}")
        return row.cells

    def without(self, images: set[str], truth: str) -> list[Row]:
        """The rows of images that are not among these, each with that as its problem."""
        problem = f"the row of {self.table} has no image in {truth}"
        return [Row(row.line, {"image": image}, problem) for image, row in self.rows.items() if image not in images]


def _columns(diagnoses: Mapping[str, Diagnosis | None]) -> tuple[str, ...]:
    return ("image", *(word.upper() for word in diagnoses))


def _one_hot_candidate(
    cells: Mapping[str, str],
    file: str | None,
    diagnoses: Mapping[str, Diagnosis | None],
    metadata: _Metadata,
    official_split: Split | None,
) -> Candidate:
    label = _one_hot(cells, [word.upper() for word in diagnoses])
    known = metadata.cells(cells["image"])
    site, concepts = parse_site("anatom_site_general", known, SITES)
    return Candidate(
        image_id=cells["image"],
        file=file,
        source_label=label,
        diagnosis=diagnoses[label.lower()],
        age_years=parse_age("age_approx", known.get("age_approx", "")),
        sex=parse_mapped(SEXES, "sex", known.get("sex", "")),
        site=site,
        lesion_id=known_or_none(known.get("lesion_id", "")),
        official_split=official_split,
        concepts=concepts,
    )


def _one_hot(cells: Mapping[str, str], labels: Sequence[str]) -> str:
    """The label whose cell is 1."""
    values = {label: cells[label] for label in labels}
    for label, value in values.items():
        if not re.fullmatch(r"[01](\.0*)?", value):
            raise BadRowError(f"{label} {value[:80]!r} is neither 0 nor 1")
    ones = [label for label, value in values.items() if value.startswith("1")]
    if len(ones) != 1:
        raise BadRowError(f"{', '.join(ones) or 'no label'} is 1; exactly one of {', '.join(labels)} must be")
    return ones[0]


def _malignant(cells: Mapping[str, str]) -> bool | None:
    """What the two columns say that is known; they may not contradict each other."""
    word = parse_mapped({"benign": False, "malignant": True}, "benign_malignant", cells["benign_malignant"])
    target = parse_mapped({"0": False, "0.0": False, "1": True, "1.0": True}, "target", cells["target"])
    if word is not None and target is not None and word != target:
        raise BadRowError(f"benign_malignant {cells['benign_malignant']!r} contradicts target {cells['target']!r}")
    return target if word is None else word


def _shared_lesion(image: str, twins: Mapping[str, set[str]]) -> str | None:
    """A name for the lesion that the publisher's duplicates show, the same for all of them; None without duplicates."""
    if image not in twins:
        return None
    found, new = {image}, {image}
    while new:
        new = set().union(*(twins[one] for one in new)) - found
        found |= new
    return f"duplicates_of_{min(found)}"


def _read_twins(source: str, folder: Path, table: str | None) -> tuple[dict[str, set[str]], list[Quarantined]]:
    """For each image those that the publisher pairs with it; and the rows that are no pair."""
    twins: dict[str, set[str]] = {}
    bad_pairs = []
    for row in read_table(folder / table, ("image_name_1", "image_name_2")) if table else ():
        one, other = (known_or_none(row.cells.get(name, "")) for name in ("image_name_1", "image_name_2"))
        if row.problem or not one or not other or one == other:
            reason = f"{table} line {row.line}: {row.problem or 'it names no two images'}"
            bad_pairs.append(Quarantined(source=source, image_id=one or other or None, file=None, reason=reason))
            continue
        twins.setdefault(one, set()).add(other)
        twins.setdefault(other, set()).add(one)
    return twins, bad_pairs
