"""A folder of images with a table, or with a folder a class: the imagefolder convention of Hugging Face's `datasets`.

With a table: `metadata.csv`, `metadata.jsonl` or `metadata.parquet` at the top, whose column `file_name` holds relative
paths, beside any of `COLUMNS`; all its other columns become concepts. Without: the name of the folder in which an image
lies is its label, a folder above it that is called train, val or test its official split, and a side file with the
suffix .caption or .txt its text. https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from derm_pipeline.records import Diagnosis, Modality, Quarantined, Site, SkinTypeOrigin
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.imagefolder.cells import CellReader
from derm_pipeline.sources.imagefolder.files import Tree, checked_path, clashes, image_ids, look_below
from derm_pipeline.sources.imagefolder.typed_tables import read_jsonl, read_parquet
from derm_pipeline.sources.listing import (
    BadRowError,
    Candidate,
    Listing,
    Row,
    files_by_name,
    fingerprint_files,
    pair,
    read_table,
)
from derm_pipeline.sources.tables import MAX_ROW_CHARS, as_text

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_SUFFIXES = (".caption", ".txt")

Column = Literal[
    "file_name",
    "image_id",
    "text",
    "diagnosis",
    "source_label",
    "malignant",
    "age_years",
    "age_range",
    "sex",
    "site",
    "skin_type",
    "skin_tone",
    "ethnicity",
    "lesion_id",
    "patient_id",
    "split",
    "modality",
]
COLUMNS: tuple[Column, ...] = get_args(Column)
"""Our names of the columns that are understood; those of a record, with `split` for the official one."""


class ImageFolderConfig(BaseModel):
    """How a folder's table and labels are to be understood."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str | None = None
    """The table, relative to the folder (.csv, .jsonl, .parquet); None for metadata.*, or for no table at all."""
    columns: dict[Column, str] = Field(default_factory=dict)
    """Our name of a column -> the table's, where they differ. `image_id` and no `file_name`: files go by their stem."""
    diagnoses: dict[str, Diagnosis | None] = Field(default_factory=dict)
    """A label in any case -> its diagnosis, or null for one that has none; ours (mel, nv ...) need not be named."""
    sites: dict[str, Site | None] = Field(default_factory=dict)
    """A word for a site in any case -> ours, or null; ours need not be named."""
    unmapped: Literal["keep", "refuse"] = "keep"
    """Labels that mean no diagnosis here: keep the image without diagnosis, or quarantine it."""
    modality: Modality = Modality.DERMOSCOPIC
    """Of the images for which the table says none."""
    malignant: bool | None = None
    """Of the images for which the table says nothing; null: as follows from the diagnosis."""
    skin_type_origin: SkinTypeOrigin = SkinTypeOrigin.LABELLED
    """How the table's skin types and tones are known."""

    @field_validator("table")
    @classmethod
    def _table_stays_inside(cls, table: str | None) -> str | None:
        return None if table is None else checked_path("the table", table)

    @field_validator("diagnoses", "sites", mode="before")
    @classmethod
    def _lower(cls, mapping: Any) -> Any:
        """Labels in lower case; whole numbers as text, since YAML reads them so."""
        if not isinstance(mapping, Mapping):
            return mapping
        found: dict[str, Any] = {}
        for label, meaning in mapping.items():
            if isinstance(label, bool) or not isinstance(label, str | int):
                raise ValueError(f"the label {label!r} is no text; write it in quotes (YAML reads a bare no as false)")
            word = str(label).strip().lower()
            if found.setdefault(word, meaning) != meaning:
                raise ValueError(f"the label {label!r} is there twice, with two meanings")
        return found


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """A folder of images as a source; see the module. The image_id follows from the path (`image_ids`)."""

    name: str
    title: str
    licence: str
    citation: str = ""
    homepage: str = ""
    settings: ImageFolderConfig = ImageFolderConfig()

    @property
    def diagnoses(self) -> Mapping[str, Diagnosis | None]:
        """See `Source.diagnoses`: our own words, and those of the settings."""
        return {diagnosis.value: diagnosis for diagnosis in Diagnosis} | self.settings.diagnoses

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Check that the table, if there should be one, and at least one image file are there."""
        tree = self._look(folder)
        table = self._table(folder, tree)
        if table is not None:
            self._read(folder, table)
        if not tree.images:
            raise FileNotFoundError(f"no image file in {folder}. {_EXPECTED}")

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        tree = self._look(folder)
        table = self._table(folder, tree)
        if table is None:
            listing = self._list_folders(folder, tree)
        elif self._is_by_stem:
            rows = self._read(folder, table)
            read = self._reader(rows).candidate
            listing = pair(self.name, rows, _by_stem(tree.images), read, id_column=self._column("image_id"))
        else:
            listing = self._list_paths(tree, self._read(folder, table))
        links = (self._quarantine(None, link, "a link to a folder is not followed") for link in tree.links)
        return Listing(listing.candidates, (*listing.quarantined, *links))

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`: of the settings too, since the records depend on them."""
        tree = self._look(folder)
        table = self._table(folder, tree)
        beside = [table] if table else [name for name in tree.others if name.endswith(CAPTION_SUFFIXES)]
        settings = json.dumps(self.settings.model_dump(mode="json"), sort_keys=True)
        files = fingerprint_files(folder, [*beside, *tree.images], ())
        links = "\n".join(as_text(link) for link in tree.links)
        return hashlib.sha256(f"{settings}\n{files}\n{links}".encode()).hexdigest()

    @property
    def _is_by_stem(self) -> bool:
        return "image_id" in self.settings.columns and "file_name" not in self.settings.columns

    def _column(self, name: Column) -> str:
        return self.settings.columns.get(name, name)

    def _look(self, folder: Path) -> Tree:
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.title} is looked for in {folder}, which is not a folder. {_EXPECTED}")
        return look_below(folder)

    def _table(self, folder: Path, tree: Tree) -> str | None:
        if self.settings.table is not None:
            if not (folder / self.settings.table).is_file():
                raise FileNotFoundError(f"no table {self.settings.table} in {folder}, as `table` says. {_EXPECTED}")
            return self.settings.table
        found = [name for name in TABLES if name in tree.others]
        if len(found) > 1:
            raise ValueError(f"{folder} has several tables: {', '.join(found)}; say in `table` which is meant")
        deeper = [name for name in tree.others if PurePosixPath(name).name in TABLES]
        if not found and deeper:
            raise ValueError(
                f"{folder} has no table at the top, but {', '.join(deeper[:5])}; join them into one at the top, with "
                "paths from there in file_name, or say in `table` which is meant"
            )
        if not found and self.settings.columns:
            raise FileNotFoundError(f"no {', '.join(TABLES)} in {folder}, and `columns` needs one. {_EXPECTED}")
        return found[0] if found else None

    def _read(self, folder: Path, table: str) -> list[Row]:
        path = folder / table
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link that leaves the source's folder")
        needed = {*self.settings.columns.values(), self._column("image_id" if self._is_by_stem else "file_name")}
        readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
        return readers.get(path.suffix.lower(), read_table)(path, sorted(needed))

    def _reader(self, rows: Iterable[Row] = ()) -> CellReader:
        there = {name for row in rows for name in row.cells}
        columns: dict[str, str] = {name: self._column(name) for name in COLUMNS if self._column(name) in there}
        return CellReader(self.settings, columns, self.diagnoses)

    def _quarantine(self, image_id: str | None, file: str | None, reason: str) -> Quarantined:
        file = None if file is None else as_text(file)
        return Quarantined(source=self.name, image_id=image_id, file=file, reason=as_text(reason))

    def _list_paths(self, tree: Tree, rows: list[Row]) -> Listing:
        """Rows that name their file by its path."""
        reader = self._reader(rows)
        named = _Named(self._column("file_name"), reader.columns.get("image_id"), rows, tree.images)
        quarantined = [self._quarantine(None, file, reason) for file, reason in named.refused]
        ids = [Row(row.line, {"image_id": image_id}, row.problem) for row, image_id, _ in named.rows]
        cells: dict[str, Mapping[str, str]] = {}
        files: dict[str, list[str]] = {}
        for row, image_id, file in named.rows:
            if cells.setdefault(image_id, row.cells) is row.cells and file is not None:
                files[image_id] = [file]
        listing = pair(
            self.name,
            ids,
            files,
            lambda named_by, file: reader.candidate(cells[named_by["image_id"]], file, named_by["image_id"]),
        )
        quarantined += listing.quarantined
        told = {candidate.file for candidate in listing.candidates} | {bad.file for bad in quarantined}
        line_of = {file: row.line for row, _, file in named.rows}
        for file in tree.images:
            if file not in told and as_text(file) not in told:
                line = line_of.get(file)
                reason = "the file is on disk and not in the table"
                reason = f"its row, table line {line}, is quarantined" if line is not None else reason
                quarantined.append(self._quarantine(None, file, reason))
        return Listing(listing.candidates, tuple(quarantined))

    def _list_folders(self, folder: Path, tree: Tree) -> Listing:
        """No table: the folders say what there is to know."""
        ids = image_ids(tree.images)
        refused = clashes(ids)
        reader = self._reader()
        others = set(tree.others)
        candidates: list[Candidate] = []
        quarantined: list[Quarantined] = []
        for file in tree.images:
            try:
                if file in refused:
                    raise BadRowError(refused[file])
                if as_text(file) != file:
                    raise BadRowError("the file's name is not UTF-8")
                candidates.append(reader.from_path(ids[file], file, _side_text(folder, file, others)))
            except BadRowError as error:
                quarantined.append(self._quarantine(ids[file], file, str(error)))
        return Listing(tuple(candidates), tuple(quarantined))


_EXPECTED = (
    f"Expected there: images, in folders if you like, and either a table ({', '.join(TABLES)}) whose column file_name "
    "holds their relative paths, or a folder a class"
)


class _Named:
    """Rows whose file and image_id are known; `refused` are the others: (file, reason)."""

    def __init__(self, file_column: str, id_column: str | None, rows: Iterable[Row], images: Iterable[str]) -> None:
        self.rows: list[tuple[Row, str, str | None]] = []
        self.refused: list[tuple[str | None, str]] = []
        pathed = list(self._pathed(file_column, rows))
        found = files_by_name({path for _, path in pathed}, {file: [file] for file in images})
        # A row whose file is not there has an image_id all the same, so that it can be named.
        chosen = {path: found.get(path, [path])[0] for _, path in pathed}
        ids = image_ids(chosen.values())
        given = {
            path: row.cells[id_column] for row, path in reversed(pathed) if id_column and row.cells.get(id_column, "")
        }
        refused = clashes({file: image_id for file, image_id in ids.items() if file not in given})
        lines: dict[str, int] = {}
        told: set[str] = set()
        for row, path in pathed:
            file = chosen[path]
            reason = refused.get(file) if path not in given else None
            if len(found.get(path, ())) > 1:
                reason = f"several files for {path}: {', '.join(found[path])}; keep one"
            elif file in lines:
                reason = f"the file {file} is already that of line {lines[file]}, which is kept"
            if reason is not None:
                self.refused.append((None if file in told else file, f"table line {row.line}: {reason}"))
                told.add(file)
                continue
            told.add(file)
            lines[file] = row.line
            self.rows.append((row, given.get(path, ids[file]), file if path in found else None))

    def _pathed(self, column: str, rows: Iterable[Row]) -> Iterable[tuple[Row, str]]:
        for row in rows:
            try:
                yield row, checked_path(column, row.cells.get(column, ""))
            except BadRowError as error:
                self.refused.append((None, f"table line {row.line}: {row.problem or error}"))


def _by_stem(files: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(PurePosixPath(file).stem, []).append(file)
    return found


def _side_text(folder: Path, file: str, others: set[str]) -> str | None:
    """The caption that lies beside an image, if one does."""
    for suffix in CAPTION_SUFFIXES:
        name = file.rpartition(".")[0] + suffix
        if name not in others:
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise BadRowError(f"its caption {name} is no file within the source's folder")
        with path.open("rb") as handle:
            content = handle.read(MAX_ROW_CHARS + 1)
        if len(content) > MAX_ROW_CHARS:
            raise BadRowError(f"its caption {name} has more than {MAX_ROW_CHARS:,} bytes")
        try:
            return content.decode("utf-8-sig").strip() or None
        except UnicodeDecodeError:
            raise BadRowError(f"its caption {name} is not UTF-8 text") from None
    return None
