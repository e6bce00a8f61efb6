"""The phantom source: a folder of drawn images, in the same shape as a dataset that somebody published.

The folder holds phantom.json (the settings, written last: what has it is finished), metadata.csv, images/ID.jpg and, as
ground truth, masks/lesion/ID.png and masks/hair/ID.png (255 inside). What the pictures look like is `drawing`'s
business.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
from pydantic import ValidationError

from derm_pipeline.images import encode_jpeg, encode_png
from derm_pipeline.records import Diagnosis, Sex, Site, SkinType, SkinTypeOrigin
from derm_pipeline.sources.base import OnProgress, num_cores
from derm_pipeline.sources.listing import (
    BadRowError,
    Candidate,
    Listing,
    find_images,
    fingerprint_files,
    pair,
    parse_age,
    parse_mapped,
    parse_word_or_none,
    read_table,
)
from derm_pipeline.sources.phantom.drawing import DRAWN, Artefact, Phantom, PhantomCase, PhantomConfig, draw, plan
from derm_pipeline.sources.phantom.truth import TRUTHS

SETTINGS = "phantom.json"
TABLE = "metadata.csv"
IMAGES = "images"
LESION_MASKS = "masks/lesion"
HAIR_MASKS = "masks/hair"

ARTEFACTS: tuple[str, ...] = get_args(Artefact)
_NEEDED = (
    *("image_id", "lesion_id", "patient_id", "diagnosis", "skin_type", "sex", "age", "site"),
    *(*ARTEFACTS, "structures"),
)
CONCEPTS = (*ARTEFACTS, "structures", "subtlety", *TRUTHS)
COLUMNS = (*_NEEDED, "subtlety", *TRUTHS)
"""Columns of the table; a folder that an earlier version drew has only those of `_NEEDED`."""

_UNFINISHED = ".drawing"
_CHUNK = 32
_JPEG_QUALITY = 95


class PhantomSource:
    """Images drawn from `config`, on demand.

    Without a config it takes the folder as it is: a finished one is left alone, whatever it was drawn with, a begun one
    is finished with its own settings, and an empty one gets the defaults (3,200 images). With a config it insists.
    """

    name = "phantom"
    title = "Phantoms"
    licence = "Apache-2.0"
    citation = "Drawn by derm_pipeline; no image shows a person."
    diagnoses: Mapping[str, Diagnosis | None] = {diagnosis.value: diagnosis for diagnosis in DRAWN}
    homepage = "drawn on this machine by derm_pipeline.sources.phantom"

    def __init__(self, config: PhantomConfig | None = None) -> None:
        self.config = config

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Draw what is missing; interrupted and called again, it goes on and the files are the same.

        A finished folder is left as it is, edited images included. If it was drawn with a smaller `num_images` and the
        same other settings, the rest is drawn.

        Raises:
            ValueError: the folder was drawn, or begun, with other settings, or holds images from elsewhere.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            config = self.config or _settings_of(folder) or PhantomConfig()
            num_finished = _num_finished(folder, config)
            if num_finished < config.num_images:
                _draw_all(folder, config, num_finished, on_progress)

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} holds no finished phantoms (no {SETTINGS}); prepare the source first")
        rows = read_table(folder / TABLE, _NEEDED)
        return pair(self.name, rows, find_images(folder, [IMAGES]), _candidate)

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} holds no finished phantoms (no {SETTINGS}); prepare the source first")
        return fingerprint_files(folder, [SETTINGS, TABLE], [IMAGES])


def _settings_of(folder: Path) -> PhantomConfig | None:
    """What the folder is being drawn with, or else was drawn with; None for neither."""
    return _read_settings(folder / _UNFINISHED / SETTINGS) or _read_settings(folder / SETTINGS)


def _num_finished(folder: Path, config: PhantomConfig) -> int:
    """How many images need no drawing."""
    finished = _read_settings(folder / SETTINGS)
    begun = _read_settings(folder / _UNFINISHED / SETTINGS)
    if finished is not None:
        if finished == config:
            return config.num_images
        begun = begun or finished.model_copy(update={"num_images": config.num_images})
        if begun == config and finished.num_images < config.num_images:
            return finished.num_images
    elif begun == config or (begun is None and not find_images(folder, [IMAGES])):
        return 0
    elif begun is None:
        raise ValueError(f"{folder / IMAGES} holds images that were not drawn as phantoms; use another folder")
    raise ValueError(
        f"{folder} was drawn with other settings ({_difference(finished or begun, config)}); "
        "remove the folder to draw it anew, or ask for those settings"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time draws into a folder; the others wait and then find it finished."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read_settings(path: Path) -> PhantomConfig | None:
    if not path.is_file():
        return None
    try:
        return PhantomConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} does not hold the settings of phantoms: {error}") from error


def _difference(there: PhantomConfig, wanted: PhantomConfig) -> str:
    asked = wanted.model_dump()
    found = there.model_dump()
    return ", ".join(f"{name} is {found[name]}, not {asked[name]}" for name in asked if found[name] != asked[name])


def _draw_all(folder: Path, config: PhantomConfig, num_finished: int, on_progress: OnProgress | None) -> None:
    """Draw the cases from `num_finished` on, in chunks; a chunk is done when its rows are in the unfinished folder."""
    unfinished = folder / _UNFINISHED
    for subfolder in (IMAGES, LESION_MASKS, HAIR_MASKS, _UNFINISHED):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    settings = config.model_dump_json(indent=2).encode() + b"\n"
    _write(unfinished / SETTINGS, settings)
    cases = plan(config)[num_finished:]
    chunks = [cases[start : start + _CHUNK] for start in range(0, len(cases), _CHUNK)]
    num_done = num_finished
    executor = ThreadPoolExecutor(num_cores(), thread_name_prefix="phantom")
    try:
        for chunk in executor.map(lambda chunk: _draw_chunk(folder, chunk, config), chunks):
            num_done += len(chunk)
            if on_progress is not None:
                on_progress(num_done, config.num_images)
    finally:
        executor.shutdown(cancel_futures=True)
    rows = _rows_of_table(folder / TABLE) if num_finished else []
    for chunk in chunks:
        rows += json.loads(_rows_file(folder, chunk).read_bytes())
    # Rows that an earlier version wrote lack the newer columns.
    table = _csv([COLUMNS, *([row.get(column, "") for column in COLUMNS] for row in rows)])
    _write(folder / TABLE, table.encode())
    _write(folder / SETTINGS, settings)
    for subfolder in (IMAGES, LESION_MASKS, HAIR_MASKS, "."):
        for aside in (folder / subfolder).glob(".*.part"):  # of an interrupted run
            aside.unlink()
    shutil.rmtree(unfinished)


def _rows_of_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _rows_file(folder: Path, chunk: Sequence[PhantomCase]) -> Path:
    return folder / _UNFINISHED / f"{chunk[0].image_id}.json"


def _draw_chunk(folder: Path, chunk: Sequence[PhantomCase], config: PhantomConfig) -> Sequence[PhantomCase]:
    rows_file = _rows_file(folder, chunk)
    if not rows_file.exists():
        rows = []
        for case in chunk:
            phantom = draw(case, config.width_px, config.height_px)
            for subfolder, mask in ((LESION_MASKS, phantom.lesion_mask), (HAIR_MASKS, phantom.hair_mask)):
                _write(folder / subfolder / f"{case.image_id}.png", encode_png(mask.astype(np.uint8) * 255))
            _write(folder / IMAGES / f"{case.image_id}.jpg", encode_jpeg(phantom.image, quality=_JPEG_QUALITY))
            rows.append(_row(phantom))
        _write(rows_file, json.dumps(rows).encode())
    return chunk


def _row(phantom: Phantom) -> dict[str, str]:
    case = phantom.case
    row = {
        "image_id": case.image_id,
        "lesion_id": case.lesion_id,
        "patient_id": case.patient_id,
        "diagnosis": case.diagnosis,
        "skin_type": str(int(case.skin_type)),
        "sex": case.sex or "",
        "age": str(case.age_years or ""),
        "site": case.site or "",
        "structures": "; ".join(phantom.structures),
        "subtlety": f"{case.subtlety:.4f}",
    }
    row |= {artefact: "yes" if artefact in case.artefacts else "no" for artefact in ARTEFACTS}
    return row | phantom.truth.concepts()


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file aside and rename it, so that it is never seen in part."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(content)
    aside.replace(path)


def _candidate(cells: Mapping[str, str], file: str | None) -> Candidate:
    return Candidate(
        image_id=cells["image_id"],
        file=file,
        source_label=cells["diagnosis"],
        diagnosis=parse_mapped(PhantomSource.diagnoses, "diagnosis", cells["diagnosis"]),
        age_years=parse_age("age", cells["age"]),
        sex=parse_word_or_none(Sex, "sex", cells["sex"]),
        site=parse_word_or_none(Site, "site", cells["site"]),
        skin_type=_skin_type(cells["skin_type"]),
        skin_type_origin=SkinTypeOrigin.DRAWN,
        lesion_id=cells["lesion_id"] or None,
        patient_id=cells["patient_id"] or None,
        concepts={name: cells[name] for name in CONCEPTS if cells.get(name)},
    )


def _skin_type(text: str) -> SkinType:
    if text not in {"1", "2", "3", "4", "5", "6"}:
        raise BadRowError(f"skin_type {text!r} is not a whole number from 1 to 6")
    return SkinType(int(text))
