"""What a source is, and how its files become records.

An adapter only says which images there should be (`list_images`); opening, checking and digesting the files is the
same for all and is done here. A file or row that cannot become a record is quarantined with the reason, never dropped.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from derm_pipeline.images import BadImageError, Pixels, decode_strictly, read_bytes, to_square
from derm_pipeline.records import Diagnosis, Quarantined, Record, quarantine_table, records_table
from derm_pipeline.sources.listing import Candidate, Listing
from derm_pipeline.sources.statistics import MEASURED, STATISTICS_SCHEMA, WORK_PX, estimated_skin_types, measure

OnProgress = Callable[[int, int], None]
"""Called as (done, total)."""

_CHUNK = 64
_AHEAD = 3
"""Chunks a worker that are looked at, or waiting, before their turn."""


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
    """The outcome of one look at a source's folder: every row and file is in `records` or in `quarantined`."""

    records: pa.Table
    """`RECORD_SCHEMA`, ordered by image_id."""
    quarantined: pa.Table
    """`QUARANTINE_SCHEMA`, ordered by image_id and file."""
    statistics: pa.Table
    """`STATISTICS_SCHEMA`, a row a record and in the same order."""
    num_processed: int
    """Files that were decoded, or that were tried and are broken."""
    num_reused: int
    """Records whose file was not decoded again, because the previous table has its digest."""


@dataclass(frozen=True)
class _Facts:
    """What is known of one readable file."""

    sha256: str
    size_bytes: int
    width_px: int
    height_px: int
    row: int
    """Row of the measured statistics: of those just made, or of the previous ones."""
    is_reused: bool


@dataclass(frozen=True)
class _Looked:
    """What became of some candidates, in their order."""

    candidates: Sequence[Candidate]
    outcomes: list[_Facts | str]
    """Facts of each one's file, or the reason why there are none."""
    measured: pa.RecordBatch
    """Statistics of the files that were decoded."""
    num_processed: int


def scan(
    source: Source,
    folder: Path,
    previous: pa.Table | None = None,
    *,
    num_workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Scan:
    """Digest, check and measure every image of a source.

    Every file is read, so that the digests are those of the bytes on disk now; a file whose digest is in `previous` is
    not decoded again. Threads do the work, since the decoders and the digest release the interpreter lock. At any time
    only a few images a worker are in memory.

    Args:
        source: the source's adapter.
        folder: where its files lie.
        previous: the statistics table of an earlier scan, or None.
        num_workers: threads; None for one a core.
        on_progress: called as (files done, files in all).

    Raises:
        FileNotFoundError: the folder or its table is missing.
        ValueError: the table is no such table, `previous` is no such table, or not one image can be read.
    """
    listing = source.list_images(folder)
    candidates = sorted(listing.candidates, key=lambda candidate: candidate.image_id)
    files = _Files(os.path.realpath(folder), previous)
    chunks = (candidates[start : start + _CHUNK] for start in range(0, len(candidates), _CHUNK))
    tables = _Tables(source.name, files)
    num_done = 0
    for looked in _in_order(files.look, chunks, num_workers or num_cores()):
        tables.add(looked)
        num_done += len(looked.candidates)
        if on_progress is not None:
            on_progress(num_done, len(candidates))
    quarantined = sorted(
        [*listing.quarantined, *tables.quarantined], key=lambda row: (row.image_id or "", row.file or "", row.reason)
    )
    if not tables.records:
        raise ValueError(_nothing_readable(source.name, folder, quarantined))
    return Scan(
        pa.concat_tables(tables.records).combine_chunks(),
        quarantine_table(quarantined),
        pa.concat_tables(tables.statistics).combine_chunks(),
        tables.num_processed,
        tables.num_reused,
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(
    look: Callable[[Sequence[Candidate]], _Looked], chunks: Iterable[Sequence[Candidate]], num_workers: int
) -> Iterator[_Looked]:
    """The chunks' outcomes in their order, looked at by threads that are never far ahead of whoever takes them."""
    waiting: deque[Future[_Looked]] = deque()
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="scan")
    try:
        for chunk in chunks:
            waiting.append(executor.submit(look, chunk))
            if len(waiting) > _AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


class _Files:
    """The files below one folder; those with the digest of a previous row are not decoded."""

    def __init__(self, root: str, previous: pa.Table | None) -> None:
        self.root = root
        self.previous = _check_previous(previous)
        self._rows = {sha256: row for row, sha256 in enumerate(self.previous["sha256"].to_pylist())}
        self._widths, self._heights = (self.previous[name].to_pylist() for name in ("width_px", "height_px"))

    def look(self, chunk: Sequence[Candidate]) -> _Looked:
        """Read, digest and check the files of some candidates, and measure those that are new."""
        outcomes: list[_Facts | str] = []
        decoded: list[Pixels] = []
        num_broken = 0
        for candidate in chunk:
            try:
                content = self._read(candidate.file)
            except BadImageError as error:
                outcomes.append(str(error))
                continue
            try:
                outcomes.append(self._facts(content, decoded))
            except BadImageError as error:
                outcomes.append(str(error))
                num_broken += 1
        images = np.stack(decoded) if decoded else np.empty((0, WORK_PX, WORK_PX, 3), np.uint8)
        return _Looked(chunk, outcomes, measure(images), len(decoded) + num_broken)

    def _facts(self, content: bytes, decoded: list[Pixels]) -> _Facts:
        """Facts of a file, whose pixels join `decoded` unless they are known."""
        sha256 = hashlib.sha256(content).hexdigest()
        row = self._rows.get(sha256)
        if row is not None:
            return _Facts(sha256, len(content), self._widths[row], self._heights[row], row, is_reused=True)
        pixels, (width, height) = decode_strictly(content, reduce_to_px=WORK_PX)
        decoded.append(to_square(pixels, WORK_PX, "squash"))
        return _Facts(sha256, len(content), width, height, len(decoded) - 1, is_reused=False)

    def _read(self, file: str | None) -> bytes:
        if file is None:
            raise BadImageError("the file is missing on disk")
        path = Path(self.root, file)
        if "\0" in file or not Path(os.path.realpath(path)).is_relative_to(self.root):
            raise BadImageError("the path leaves the source's folder")
        if path.exists() and not path.is_file():
            raise BadImageError("it is not a regular file")
        try:
            return read_bytes(path)
        except OSError as error:
            raise BadImageError(f"the file cannot be read ({error.strerror or error})") from error


def _check_previous(previous: pa.Table | None) -> pa.Table:
    if previous is None:
        return STATISTICS_SCHEMA.empty_table()
    if previous.schema.names != STATISTICS_SCHEMA.names:
        found = ", ".join(previous.schema.names)
        raise ValueError(f"the previous table must be the statistics of an earlier scan; its columns are {found}")
    return previous.cast(STATISTICS_SCHEMA).combine_chunks()


class _Tables:
    """What a scan has found so far, chunk by chunk as arrow tables."""

    def __init__(self, source: str, files: _Files) -> None:
        self.records: list[pa.Table] = []
        self.statistics: list[pa.Table] = []
        self.quarantined: list[Quarantined] = []
        self.num_processed = 0
        self.num_reused = 0
        self._source = source
        self._known = files.previous.select(MEASURED)
        self._first_of: dict[str, str] = {}

    def add(self, looked: _Looked) -> None:
        """Take in the next candidates, in order of image_id."""
        records: list[Record] = []
        all_facts: list[_Facts] = []
        for candidate, outcome in zip(looked.candidates, looked.outcomes, strict=True):
            if isinstance(outcome, str):
                self.quarantined.append(_quarantine(self._source, candidate, outcome))
                continue
            first = self._first_of.setdefault(outcome.sha256, candidate.image_id)
            duplicate_of = None if first == candidate.image_id else first
            records.append(_record(self._source, candidate, outcome, duplicate_of))
            all_facts.append(outcome)
        self.num_processed += looked.num_processed
        self.num_reused += sum(facts.is_reused for facts in all_facts)
        if records:
            table = records_table(records)
            self.records.append(table)
            self.statistics.append(self._statistics_of(table, all_facts, looked.measured))

    def _statistics_of(self, records: pa.Table, facts: Sequence[_Facts], measured: pa.RecordBatch) -> pa.Table:
        both = pa.concat_tables([pa.Table.from_batches([measured]), self._known])
        rows = both.take([one.row + one.is_reused * measured.num_rows for one in facts])
        columns = {name: rows[name] if name in MEASURED else records[name] for name in STATISTICS_SCHEMA.names[:-1]}
        columns["estimated_skin_type"] = estimated_skin_types(rows["ita_deg"], records["modality"])
        return pa.table(columns, schema=STATISTICS_SCHEMA)


def _record(source: str, candidate: Candidate, facts: _Facts, duplicate_of: str | None) -> Record:
    known = {field.name: getattr(candidate, field.name) for field in fields(candidate)}
    if candidate.malignant is None and candidate.diagnosis is not None:
        known["malignant"] = candidate.diagnosis.is_malignant
    if candidate.skin_type is not None:
        known["skin_tone"] = candidate.skin_type.tone
    return Record(
        source=source,
        duplicate_of=duplicate_of,
        sha256=facts.sha256,
        size_bytes=facts.size_bytes,
        width_px=facts.width_px,
        height_px=facts.height_px,
        **known,
    )


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
