"""A source's table and its image files, brought together without opening an image.

What the adapters share: read a CSV as text, find the image files by name, give every row its file, and name each row
and each file for which that fails. Which words a dataset uses is the adapter's business, not this module's.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from derm_pipeline.images import SUFFIXES
from derm_pipeline.records import (
    Diagnosis,
    ImageId,
    Modality,
    Quarantined,
    Sex,
    Site,
    SkinTone,
    SkinType,
    SkinTypeOrigin,
    Split,
)
from derm_pipeline.sources.tables import Row as Row
from derm_pipeline.sources.tables import read_table as read_table

OTHER_SUFFIXES = {".bmp", ".gif", ".heic", ".jfif", ".jp2", ".tif", ".tiff", ".webp"}
"""Pictures that are not read: they are listed all the same, so that they are quarantined and not overlooked."""

UNKNOWN_WORDS = frozenset(
    {
        "",
        "unknown",
        "nan",
        "na",
        "n/a",
        "#n/a",
        "<na>",
        "nat",
        "none",
        "null",
        "nil",
        "not available",
        "missing",
        "-",
        "?",
    }
)
"""What stands in a cell whose value the publisher does not know, in lower case."""

_WORD = TypeVar("_WORD", bound=StrEnum)
_VALUE = TypeVar("_VALUE")
_IMAGE_ID: TypeAdapter[str] = TypeAdapter(ImageId)


class BadRowError(ValueError):
    """A row of a source's table that cannot become a record; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What a source's table says of one image, before its file is opened; the fields are those of `Record`."""

    image_id: str
    file: str | None
    """Path relative to the source's folder, with forward slashes; None when there is no such file."""
    source_label: str
    diagnosis: Diagnosis | None
    modality: Modality = Modality.DERMOSCOPIC
    malignant: bool | None = None
    """What the source says; None means that it follows from the diagnosis, if there is one."""
    age_years: int | None = None
    age_range: str | None = None
    sex: Sex | None = None
    site: Site | None = None
    skin_type: SkinType | None = None
    skin_tone: SkinTone | None = None
    """Only where the source gives a tone and no skin type; else it follows from the skin type."""
    skin_type_origin: SkinTypeOrigin | None = None
    ethnicity: str | None = None
    lesion_id: str | None = None
    patient_id: str | None = None
    official_split: Split | None = None
    concepts: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None


@dataclass(frozen=True)
class Listing:
    """Every row of a source's table and every image file in its folder, each exactly once."""

    candidates: tuple[Candidate, ...]
    quarantined: tuple[Quarantined, ...]


def find_images(folder: Path, subfolders: Sequence[str]) -> dict[str, list[str]]:
    """Image files by image_id (the name without its suffix), as sorted relative paths.

    Only the named subfolders are looked at ("." is the folder itself), not what lies below them; those that do not
    exist and hidden files are passed over.
    """
    files: dict[str, list[str]] = {}
    for name in _image_names(folder, subfolders):
        files.setdefault(Path(name).stem, []).append(name)
    return {image_id: sorted(names) for image_id, names in files.items()}


def _image_names(folder: Path, subfolders: Sequence[str]) -> list[str]:
    suffixes = SUFFIXES | OTHER_SUFFIXES
    names = []
    for subfolder in subfolders:
        if not (folder / subfolder).is_dir():
            continue
        prefix = "" if subfolder == "." else subfolder + "/"
        with os.scandir(folder / subfolder) as entries:
            for entry in entries:
                suffix = "." + entry.name.rpartition(".")[2].lower()
                if suffix in suffixes and not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False):
                    names.append(prefix + entry.name)
    return names


def fingerprint_files(folder: Path, tables: Iterable[str], subfolders: Sequence[str]) -> str:
    """Digest of the names, sizes, times and modes of a source's tables and image files; no file is opened.

    The mode, since a file that could not be read is quarantined, and may be read once that is mended.
    """
    digest = hashlib.sha256()
    for name in sorted([*tables, *_image_names(folder, subfolders)]):
        path = os.path.join(folder, name)  # noqa: PTH118  twice as fast as Path for tens of thousands of names
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)  # noqa: PTH110, PTH116  a link may lead nowhere
        facts = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_mode:o}\n"
        digest.update(facts.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def pair(
    source: str,
    rows: Iterable[Row],
    files: Mapping[str, Sequence[str]],
    to_candidate: Callable[[Mapping[str, str], str | None], Candidate],
    *,
    id_column: str = "image_id",
) -> Listing:
    """Give every row its file, and quarantine the rows and files that cannot be brought together.

    A file belongs to the row whose image_id is its name without the suffix; where there is no such file, to the only
    row whose image_id differs from it in case only. Several files for one row are all named, and none is guessed.

    Args:
        source: the source's name.
        rows: the table's rows.
        files: relative paths by image_id, as from `find_images`.
        to_candidate: reads one row's cells, given its file; raises BadRowError.
        id_column: the column that holds the image_id.

    Returns:
        As many candidates and quarantined rows as there are rows, and one quarantined file for each file without a row.
    """
    rows = list(rows)
    named = files_by_name({row.cells.get(id_column, "") for row in rows}, files)
    candidates: dict[str, Candidate] = {}
    quarantined: list[Quarantined] = []
    lines: dict[str, int] = {}
    claimed: set[str] = set()
    for row in rows:
        image_id = row.cells.get(id_column, "")
        of_row: Sequence[str] = ()
        try:
            _check_id(image_id, id_column, lines, files)
            lines[image_id] = row.line
            of_row = named.get(image_id, ())
            claimed.update(of_row[:1])
            if row.problem:
                raise BadRowError(row.problem)
            if len(of_row) > 1:
                raise BadRowError(_SEVERAL_FILES.format(", ".join(of_row)))
            candidates[image_id] = to_candidate(row.cells, of_row[0] if of_row else None)
        except BadRowError as error:
            file = of_row[0] if of_row else None
            reason = f"table line {row.line}: {error}"
            if row.problem and row.problem not in reason:
                reason += f"; {row.problem}"
            quarantined.append(Quarantined(source=source, image_id=image_id[:200] or None, file=file, reason=reason))
    quarantined += _unclaimed(source, files, named, claimed)
    return Listing(tuple(candidates.values()), tuple(quarantined))


_SEVERAL_FILES = "several files for one image_id: {}; keep one"


def files_by_name(image_ids: Collection[str], files: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The files of every image_id of the table that has some: by the same name, else by one that differs in case only.

    Files are given by case to one image_id only, and never those that another row names exactly: where two rows want
    them, neither gets them.
    """
    named = {image_id: files[image_id] for image_id in image_ids if image_id in files}
    others: dict[str, list[str]] = {}
    for stem, names in files.items():
        if stem not in named:
            others.setdefault(stem.lower(), []).extend(names)
    wanting = Counter(image_id.lower() for image_id in image_ids if image_id not in named)
    for image_id in image_ids:
        if image_id not in named and wanting[image_id.lower()] == 1 and image_id.lower() in others:
            named[image_id] = sorted(others[image_id.lower()])
    return named


def _check_id(image_id: str, id_column: str, lines: Mapping[str, int], files: Mapping[str, Sequence[str]]) -> None:
    if not image_id or (image_id.lower() in UNKNOWN_WORDS and image_id not in files):
        raise BadRowError(f"the row has no {id_column}")
    try:
        _IMAGE_ID.validate_python(image_id)
    except ValidationError:
        raise BadRowError(
            f"{id_column} {_shown(image_id)} is not a safe name; allowed: up to 128 letters, digits, dots, dashes and "
            "underscores, beginning with a letter or digit"
        ) from None
    if image_id in lines:
        raise BadRowError(f"{id_column} {image_id} is already in line {lines[image_id]}, which is kept")


def _unclaimed(
    source: str,
    files: Mapping[str, Sequence[str]],
    named: Mapping[str, Sequence[str]],
    claimed: Collection[str],
) -> list[Quarantined]:
    beside = {name: names for names in named.values() for name in names}
    by_lower_id = {image_id.lower(): names for image_id, names in named.items()}
    quarantined = []
    for image_id, names in files.items():
        for name in names:
            if name in claimed:
                continue
            reason = "the file is on disk and not in the table"
            if name in beside:
                reason = _SEVERAL_FILES.format(", ".join(beside[name]))
            elif image_id.lower() in by_lower_id:
                reason += f"; its name differs from {by_lower_id[image_id.lower()][0]} in case only"
            row = Quarantined(source=source, image_id=_as_text(image_id), file=_as_text(name), reason=_as_text(reason))
            quarantined.append(row)
    return quarantined


def _as_text(name: str) -> str:
    """A file name that is not UTF-8, made fit for a table."""
    return os.fsencode(name).decode("utf-8", "replace")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + " ...")


def parse_word(vocabulary: type[_WORD], column: str, text: str) -> _WORD:
    """The word of `vocabulary` that a cell holds.

    Raises:
        BadRowError: another word; the message lists those allowed.
    """
    try:
        return vocabulary(text)
    except ValueError:
        allowed = ", ".join(vocabulary)
        raise BadRowError(f"{column} {_shown(text)} is outside the vocabulary; allowed: {allowed}") from None


def parse_word_or_none(vocabulary: type[_WORD], column: str, text: str) -> _WORD | None:
    """Like `parse_word`; None for the spellings of unknown."""
    return None if text.lower() in UNKNOWN_WORDS else parse_word(vocabulary, column, text)


def parse_mapped(mapping: Mapping[str, _VALUE], column: str, text: str) -> _VALUE | None:
    """What a source's own word (in lower case a key of `mapping`) means here; None for the spellings of unknown.

    Raises:
        BadRowError: another word; the message lists those allowed.
    """
    word = text.lower()
    if word in mapping:
        return mapping[word]
    if word in UNKNOWN_WORDS:
        return None
    raise BadRowError(f"{column} {_shown(text)} is outside the vocabulary; allowed: {', '.join(mapping)}")


def parse_age(column: str, text: str) -> int | None:
    """A whole number of years from 1 to 120; None for the spellings of unknown, of which 0 is one (so HAM10000).

    Raises:
        BadRowError: anything else.
    """
    if text.lower() in UNKNOWN_WORDS:
        return None
    years = int(text.partition(".")[0]) if re.fullmatch(r"[0-9]{1,4}(\.0*)?", text) else -1
    if not 0 <= years <= 120:
        raise BadRowError(f"{column} {_shown(text)} is not a whole number of years from 1 to 120, nor 0 for unknown")
    return years or None
