"""A folder of samples that somebody asked for: drawn, resumed, written in one of several formats, each row traceable.

`request.json` is written first and says what the folder holds; `metadata.parquet` is written last: with it, the folder
is finished. Unfinished work lies in `.work`.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from derm_pipeline.generation.arrays import write_grid, write_npz
from derm_pipeline.generation.drawing import Batch, OnProgress, draw_batches, in_order
from derm_pipeline.generation.files import (
    Row,
    dataset_card,
    digest_of_pixels,
    encoded,
    metadata_table,
    provenance_rows,
    write_shards,
)
from derm_pipeline.generation.origins import ReadOrigin
from derm_pipeline.generation.plan import SampleRequest, Sampling, num_unseen
from derm_pipeline.generation.told import EmbedText
from derm_pipeline.generation.tones import measured_of, tone_counts
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.store import Artifact, digest_of_json, replacing, write_json, write_table

OutputFormat = Literal["png", "webp", "jpeg", "parquet", "npz", "grid"]
"""Image files (imagefolder), parquet shards of PNGs, one npz for ADM's evaluator, or one contact sheet."""

REQUEST, METADATA, CARD = "request.json", "metadata.parquet", "README.md"
_WORK, _LOCK = ".work", ".lock"
_TOLD = (set(Sampling.model_fields) - {"batch_size", "image_format", "seed"}) | {"spacing"}
_MOST_IN_GRID = 2_500
"""A sheet is one picture in memory."""
_SINGLE = {"npz": "samples.npz", "grid": "samples.png"}


def request_of(
    requests: Sequence[SampleRequest],
    config: Sampling,
    output: OutputFormat,
    *,
    recipe: str,
    generator: Artifact,
    autoencoder: Artifact,
) -> dict[str, Any]:
    """What a folder of samples holds, as `request.json` says it.

    Settings that change no sample are left out, and those that seeds, prompts and format tell already.
    """
    settings = config.model_dump(mode="json", include=_TOLD)
    return {
        "recipe": recipe,
        "generator": generator.reference.model_dump(),
        "autoencoder": autoencoder.reference.model_dump(),
        "format": output,
        "settings": settings,
        "samples": [request.identity for request in requests],
    }


def name_of(request: Mapping[str, Any]) -> str:
    """The digest of a request by contents (not by where its artifacts lie): the folder's name, and its samples'."""
    by_content = {role: request[role]["content_digest"] for role in ("generator", "autoencoder")}
    return digest_of_json(dict(request) | by_content)[:12]


def generate_folder(
    out: Path,
    requests: Sequence[SampleRequest],
    config: Sampling,
    output: OutputFormat,
    *,
    recipe: str,
    generator: Artifact,
    autoencoder: Artifact,
    licences: Sequence[str],
    columns: int = 8,
    embed_text: EmbedText | None = None,
    read_origin: ReadOrigin | None = None,
    on_progress: OnProgress | None = None,
) -> bool:
    """Draw samples into a folder; the same call again finishes what was interrupted, and then does nothing.

    Args:
        out: The folder; made if it is not there.
        requests: What to draw, numbered 0 and on.
        config: How; its `image_format` gives way to `output`.
        output: What to write.
        recipe: Whose generator it is.
        generator: That generator.
        autoencoder: Its autoencoder.
        licences: Those of the sources it was trained on.
        columns: Samples in a row of a grid.
        embed_text: The text encoder, for a generator that is told text.
        read_origin: The images that samples begin from, for requests that name one.
        on_progress: Called as (samples drawn, samples in all).

    Returns:
        Whether there was anything to do, for this process or another that it joined.

    Raises:
        ValueError: the folder holds something else, or the generator is not told what is asked for.
    """
    config = config.model_copy(update={"image_format": output if output in ("png", "webp", "jpeg") else "png"})
    request = request_of(requests, config, output, recipe=recipe, generator=generator, autoencoder=autoencoder)
    _refuse_others(out, request)
    if output == "grid" and len(requests) > _MOST_IN_GRID:
        raise ValueError(f"a grid of {len(requests):,} samples: at most {_MOST_IN_GRID:,} fit one; take another format")
    if (out / METADATA).is_file() and not (out / _WORK).exists():  # asks for no lock: it may lie where nobody writes
        return False
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise ValueError(f"{out} cannot be a folder: {error.strerror}") from error
    with _locked(out, fcntl.LOCK_EX):
        if (out / METADATA).is_file():
            shutil.rmtree(out / _WORK, ignore_errors=True)  # of who was killed after the last file
            return False
        if not (out / REQUEST).is_file():
            write_json(out / REQUEST, request)
    with _locked(out, fcntl.LOCK_SH):  # several draw together
        if (out / METADATA).is_file():
            return False
        (out / _WORK).mkdir(exist_ok=True)
        batches = draw_batches(
            requests,
            config,
            generator=generator.directory,
            autoencoder=autoencoder.directory,
            work=out / _WORK,
            embed_text=embed_text,
            read_origin=read_origin,
            on_progress=on_progress,
        )
    with _locked(out, fcntl.LOCK_EX):  # one of them writes, when all have drawn
        if not (out / METADATA).is_file():
            spec = GeneratorSpec.load(generator.directory)
            measured = measured_of(requests, chain.from_iterable(in_order(batches)), read_origin)
            rows = _rows(requests, config, output, request, batches, spec, measured)
            _write(out, batches, rows, config, output, columns)
            card = dataset_card(
                recipe,
                requests,
                licences=licences,
                size_px=np.load(batches[0].path, mmap_mode="r", allow_pickle=False).shape[2:0:-1],
                num_unseen=num_unseen(requests, spec),
                lineage_of=str(generator.reference),
                tones=tone_counts(rows),
            )
            with replacing(out / CARD) as aside:
                aside.write_text(card)
            write_table(out / METADATA, metadata_table(rows))
            shutil.rmtree(out / _WORK)
    return True


@contextmanager
def _locked(out: Path, how: int) -> Iterator[None]:
    with (out / _LOCK).open("w") as handle:
        fcntl.flock(handle, how)  # the kernel releases it when the process dies, however it dies
        yield
        if (out / METADATA).is_file():
            (out / _LOCK).unlink(missing_ok=True)


def _refuse_others(out: Path, request: Mapping[str, Any]) -> None:
    """See that the folder is this request's, or nobody's."""
    if not (out / REQUEST).is_file():
        if out.is_dir() and any(path.name != _LOCK for path in out.iterdir()):
            raise ValueError(f"{out} holds other files: choose an empty folder, or one that does not exist yet")
        return
    try:
        held = name_of(json.loads((out / REQUEST).read_text()))
    except (ValueError, KeyError, TypeError):
        held = None
    if held != name_of(request):
        raise ValueError(f"{out} holds samples of another request (see {REQUEST} there): choose another folder")


def _rows(
    requests: Sequence[SampleRequest],
    config: Sampling,
    output: OutputFormat,
    request: Mapping[str, Any],
    drawn: Sequence[Batch],
    spec: GeneratorSpec,
    measured: Sequence[Mapping[str, Any]] | None,
) -> list[dict[str, Any]]:
    recipe, name, single = request["recipe"], name_of(request), _SINGLE.get(output)
    return provenance_rows(
        requests,
        config,
        recipe=recipe,
        generator_digest=request["generator"]["content_digest"],
        autoencoder_digest=request["autoencoder"]["content_digest"],
        pixels=(digest_of_pixels(image) for image in chain.from_iterable(in_order(drawn))),
        spec=spec,
        sample_ids=lambda one: f"{recipe}/{name}/{one.number:06d}",
        file_names=(lambda one: f"{single}#{one.number}") if single else None,
        measured=measured,
    )


def _write(
    out: Path,
    drawn: Sequence[Batch],
    rows: Sequence[Row],
    config: Sampling,
    output: OutputFormat,
    columns: int,
) -> None:
    batches = in_order(drawn)
    if output == "npz":
        write_npz(out / _SINGLE["npz"], batches, len(rows))
    elif output == "grid":
        write_grid(out / _SINGLE["grid"], np.concatenate(list(batches)), columns=columns)
    else:
        files = encoded(chain.from_iterable(batches), rows, config.image_format, config.jpeg_quality)
        if output == "parquet":
            write_shards(files, out)
        else:
            _write_images(out, files)


def _write_images(out: Path, files: Iterable[tuple[Row, bytes]]) -> None:
    (out / "images").mkdir(exist_ok=True)
    for row, content in files:
        with replacing(out / row["file_name"]) as aside:
            aside.write_bytes(content)
