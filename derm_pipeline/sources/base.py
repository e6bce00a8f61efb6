"""What a source is, and how its files become records.

An adapter only says which images there should be (`list_images`); opening, checking and digesting the files is the
same for all and is done here. A file or row that cannot become a record is quarantined with the reason, never dropped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from derm_pipeline.images import BadImageError, FileFacts, inspect, read_bytes
from derm_pipeline.records import Diagnosis, Quarantined, Record, quarantine_table, records_table
from derm_pipeline.sources.listing import Candidate, Listing

OnProgress = Callable[[int, int], None]
"""Called as (done, total)."""

_CHUNK = 64


class Source(Protocol):
    """One dataset: where its images are, and what its table says of them."""

    @property
    def name(self) -> str:
        """The name in records, partitions and paths."""

    @property
    def title(self) -> str:
        """The name for people."""

    @property
    def licence(self) -> str:
        """Under which terms the images may be used."""

    @property
    def citation(self) -> str:
        """What to cite."""

    @property
    def homepage(self) -> str:
        """Where the files are to be had."""

    @property
    def diagnoses(self) -> Mapping[str, Diagnosis | None]:
        """The source's labels in lower case and what each means here; None for one that has no place in `Diagnosis`."""

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Make sure that the files are there: a drawn source draws what is missing, the others look.

        Raises:
            FileNotFoundError: they are not there; the message says where they are looked for, and in what layout.
            ValueError: the folder holds something else.
        """

    def list_images(self, folder: Path) -> Listing:
        """Every image of the table and every image file, without opening one.

        Raises:
            FileNotFoundError: the folder or its table is missing.
            ValueError: the table cannot be read, or has not the columns it needs.
        """

    def fingerprint(self, folder: Path) -> str:
        """A cheap digest (names, sizes, modification times) that changes when a file of the source does."""


@dataclass(frozen=True)
class Scan:
    """The outcome of one look at a source's folder: every row and file is in one of the two tables."""

    records: pa.Table
    """`RECORD_SCHEMA`, ordered by image_id."""
    quarantined: pa.Table
    """`QUARANTINE_SCHEMA`, ordered by image_id and file."""
    num_reused: int
    """Records whose file was not decoded again, because the previous table has its digest."""


def scan(
    source: Source,
    folder: Path,
    previous: pa.Table | None = None,
    *,
    num_workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Scan:
    """Digest and check every image of a source.

    Every file is read, so that the digests are those of the bytes on disk now; a file whose digest is in `previous` is
    not decoded again. Threads do the work, since the decoder and the digest release the interpreter lock.

    Args:
        source: the source's adapter.
        folder: where its files lie.
        previous: the records table of an earlier scan, or None.
        num_workers: threads; None for one a core.
        on_progress: called as (files done, files in all).

    Raises:
        FileNotFoundError: the folder or its table is missing.
        ValueError: the table is no such table, or not one image can be read.
    """
    listing = source.list_images(folder)
    sizes = _known_sizes(previous)
    outcomes = _look_at_all(folder, listing.candidates, sizes, num_workers or num_cores(), on_progress)
    records: list[Record] = []
    quarantined = list(listing.quarantined)
    by_id = sorted(zip(listing.candidates, outcomes, strict=True), key=lambda pair: pair[0].image_id)
    first_of: dict[str, str] = {}
    for candidate, outcome in by_id:
        if isinstance(outcome, str):
            quarantined.append(_quarantine(source.name, candidate, outcome))
            continue
        first = first_of.setdefault(outcome.sha256, candidate.image_id)
        records.append(_record(source.name, candidate, outcome, None if first == candidate.image_id else first))
    quarantined.sort(key=lambda row: (row.image_id or "", row.file or "", row.reason))
    if not records:
        raise ValueError(_nothing_readable(source.name, folder, quarantined))
    num_reused = sum(record.sha256 in sizes for record in records)
    return Scan(records_table(records), quarantine_table(quarantined), num_reused)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _known_sizes(previous: pa.Table | None) -> dict[str, tuple[int, int]]:
    if previous is None:
        return {}
    columns = (previous.column(name).to_pylist() for name in ("sha256", "width_px", "height_px"))
    return {sha256: (width, height) for sha256, width, height in zip(*columns, strict=True)}


def _look_at_all(
    folder: Path,
    candidates: Sequence[Candidate],
    sizes: Mapping[str, tuple[int, int]],
    num_workers: int,
    on_progress: OnProgress | None,
) -> list[FileFacts | str]:
    """Facts of each candidate's file, or the reason why there are none, in the order given."""
    root = os.path.realpath(folder)

    def look(chunk: Sequence[Candidate]) -> list[FileFacts | str]:
        return [_look(root, candidate.file, sizes) for candidate in chunk]

    outcomes: list[FileFacts | str] = []
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="scan")
    try:
        chunks = (candidates[start : start + _CHUNK] for start in range(0, len(candidates), _CHUNK))
        for found in executor.map(look, chunks):
            outcomes += found
            if on_progress is not None:
                on_progress(len(outcomes), len(candidates))
    finally:
        executor.shutdown(cancel_futures=True)
    return outcomes


def _look(root: str, file: str | None, sizes: Mapping[str, tuple[int, int]]) -> FileFacts | str:
    if file is None:
        return "the file is missing on disk"
    path = Path(root, file)
    if "\0" in file or not Path(os.path.realpath(path)).is_relative_to(root):
        return "the path leaves the source's folder"
    if path.exists() and not path.is_file():
        return "it is not a regular file"
    try:
        return _facts(path, sizes)
    except BadImageError as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be read ({error.strerror or error})"


def _facts(path: Path, sizes: Mapping[str, tuple[int, int]]) -> FileFacts:
    if not sizes:
        return inspect(path)
    content = read_bytes(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 in sizes:
        return FileFacts(sha256, len(content), *sizes[sha256])
    return inspect(path)


def _record(source: str, candidate: Candidate, facts: FileFacts, duplicate_of: str | None) -> Record:
    known = {field.name: getattr(candidate, field.name) for field in fields(candidate)}
    if candidate.malignant is None and candidate.diagnosis is not None:
        known["malignant"] = candidate.diagnosis.is_malignant
    if candidate.skin_type is not None:
        known["skin_tone"] = candidate.skin_type.tone
    return Record(source=source, duplicate_of=duplicate_of, **known, **asdict(facts))


def _quarantine(source: str, candidate: Candidate, reason: str) -> Quarantined:
    return Quarantined(source=source, image_id=candidate.image_id, file=candidate.file, reason=reason)


def _nothing_readable(source: str, folder: Path, quarantined: Sequence[Quarantined]) -> str:
    if not quarantined:
        return f"{source}: no image in {folder}: the table has no row, and there is no image file"
    row = quarantined[0]
    what = row.file or row.image_id or "a row"
    return (
        f"{source}: not one readable image in {folder}; the first of {len(quarantined):,} reasons: {what}: {row.reason}"
    )
