"""Row-wise stages: each image on its own, so rows are reused by digest, resumed by chunk, made on every core."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from derm_pipeline.latents import ImageFile
from derm_pipeline.sources.base import num_cores
from derm_pipeline.store import Build, write_table

CHUNK = 128

OnProgress = Callable[[int, int], None]
"""Called as (done, total)."""


def row_wise(
    build: Build,
    name: str,
    files: Sequence[ImageFile],
    compute: Callable[[Sequence[ImageFile]], pa.Table],
    on_progress: OnProgress | None = None,
    *,
    added: Sequence[str] = (),
) -> pa.Table:
    """The table of all files, in their order, with the columns of `compute` after a first column sha256.

    Rows of the previous artifact's table `name` are taken by digest; finished chunks of an interrupted build are kept.
    `compute` must depend on the image alone. Writes the count of reused rows to the build.

    Args:
        build: the artifact in the making.
        name: the table's file name, also in the previous artifact.
        files: the images; each digest's row is computed once.
        compute: images -> one row each, in order. It runs in other processes, so it must be importable.
        on_progress: called with (rows done, rows).
        added: columns that the caller adds to the table before it is written: they are not of the image alone.
    """
    unique = list({file.sha256: file for file in files}.values())
    parts = [] if build.previous is None else [build.previous.table(name).drop_columns(list(added))]
    parts += [pq.read_table(path) for path in sorted(build.work.glob(f"{name}-*"))]
    known = set().union(*(part["sha256"].to_pylist() for part in parts))
    reusable = set(build.previous.table(name, ["sha256"])["sha256"].to_pylist()) if build.previous else set()
    missing = [file for file in unique if file.sha256 not in known]
    chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
    done = len(unique) - len(missing)
    for chunk, rows in zip(chunks, _map_chunks(partial(_compute_chunk, compute), chunks), strict=True):
        write_table(build.work / f"{name}-{chunk[0].sha256}", rows)
        parts.append(rows)
        done += len(chunk)
        if on_progress:
            on_progress(done, len(unique))
    build.counts["num_reused"] = sum(file.sha256 in reusable for file in unique)
    everything = pa.concat_tables(parts).combine_chunks()
    place = {digest: position for position, digest in enumerate(everything["sha256"].to_pylist())}
    return everything.take(pa.array([place[file.sha256] for file in files], pa.int64()))


def _compute_chunk(compute: Callable[[Sequence[ImageFile]], pa.Table], chunk: Sequence[ImageFile]) -> pa.Table:
    return compute(chunk).add_column(0, "sha256", pa.array([file.sha256 for file in chunk], pa.string()))


def _map_chunks(
    work: Callable[[Sequence[ImageFile]], pa.Table], chunks: Sequence[Sequence[ImageFile]]
) -> Iterator[pa.Table]:
    num_workers = min(len(chunks), num_cores())
    if num_workers <= 1:
        yield from map(work, chunks)
        return
    # Not forked: this process may hold threads (torch, dagster), whose locks a fork would copy.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_one_thread) as pool:
        yield from pool.map(work, chunks)


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)
