"""Images to shards of moments: decoded ahead of the encoder, resumable, by one process or several at once."""

from __future__ import annotations

import fcntl
import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.images import Geometry, Pixels
from derm_pipeline.latents.moments import INDEX, Moments, open_moments, shard_path
from derm_pipeline.latents.pixels import ImageFile, orient, to_model_range
from derm_pipeline.store import replacing, write_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_AHEAD = 2
"""Batches that are decoded, or waiting, before the encoder is free for them."""
_CPU_BATCH = 32
"""Images of up to 256 px that a CPU encodes at once, whatever the batch: features of more do not stay in its caches."""
_LARGEST = 65504.0
"""The largest finite float16."""

Read = Callable[[Sequence[ImageFile]], Pixels]
Encode = Callable[["Tensor"], tuple["Tensor", "Tensor"]]


class LatentConfig(BaseModel):
    """How images become moments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_px: int = Field(default=64, ge=16, le=2048)
    """Side of the square image that is encoded, in pixels."""
    geometry: Geometry = "crop"
    """How an image becomes square: crop (ADM's centre crop), squash or pad."""
    orientations: Literal[2, 8] = 2
    """2: the image and its mirror image; 8: all rotations by 90 degrees of both (a lesion has no upright)."""
    shard_size: int = Field(default=1024, ge=1)
    """Images in one shard, at most; also what an interruption can lose."""
    batch_size: int = Field(default=128, ge=1)
    """Images decoded, and on a GPU encoded, at once; a CPU takes them in smaller parts."""


def encode_images(
    files: Sequence[ImageFile],
    read: Read,
    encode: Encode,
    config: LatentConfig,
    *,
    out: Path,
    previous: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the moments of every image to `out`, in shards with an index, and return how many rows were reused.

    A shard is float16 `moments` (n, orientations, 2 c, h, w): mean and log-variance. Shards already in `out` (of an
    interrupted run) are kept. Rows of `previous`, an earlier folder made with the same encoder and config, are copied
    by digest. While a batch is encoded the next ones are decoded. Several processes may be given the same files and
    the same `out` at once: they share the shards out between them, and each returns when all are there.

    Args:
        files: the images; the index keeps their order.
        read: images -> uint8 (n, size_px, size_px, 3); called from another thread.
        encode: float32 (n, 3, size_px, size_px) in [-1, +1], on `device` -> mean and log-variance, each (n, c, h, w),
            on any device. Its arithmetic (bf16, float32) is its own.
        config: sizes and orientations.
        out: folder to write to.
        previous: folder of an earlier artifact to reuse rows of.
        device: where `encode` wants its batches; to a GPU they go from pinned memory, without waiting.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: moments that are not finite or too large for float16 (the image is named, its shard not written),
            or `out` or `previous` hold moments of other images or another config.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = _Work(files, read, encode, config, out, device, *_earlier(previous, config))
    _check(shard for shard in work.shards if shard.path.exists())
    while missing := [shard for shard in work.shards if not shard.path.exists()]:
        _make(missing, work, on_progress)
        busy = [shard for shard in missing if not shard.path.exists()]
        # The others are being made elsewhere. Wait for one with nothing in hand (no two processes wait for each
        # other), and look again: whoever held it may have been killed.
        _make(busy[:1], work, on_progress, wait=True)
    _check(work.shards)
    _write_index(work)
    if on_progress:
        on_progress(len(files), len(files))
    return sum(work.is_reusable(file) for file in files)


@dataclass(frozen=True)
class _Shard:
    """Some of the images, and where their moments go."""

    number: int
    files: Sequence[ImageFile]
    path: Path
    plan: str
    """Digest of the images and how they become moments, kept in the file: shards of other images are not taken."""

    @property
    def lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def write(self, moments: Tensor) -> None:
        from safetensors.torch import save_file

        with replacing(self.path) as aside:
            save_file({"moments": moments.contiguous()}, aside, metadata={"plan": self.plan})


class _Work:
    """What is to be made, and of what."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        read: Read,
        encode: Encode,
        config: LatentConfig,
        out: Path,
        device: torch.device | str,
        old_rows: dict[str, int],
        old: Moments | None,
    ) -> None:
        import torch

        self.files, self.read, self.encode, self.config, self.out = files, read, encode, config, out
        self.device, self.old_rows, self.old = torch.device(device), old_rows, old
        size = config.shard_size
        chunks = (files[start : start + size] for start in range(0, len(files), size))
        self.shards = [
            _Shard(number, chunk, shard_path(out, number), _plan(chunk, config)) for number, chunk in enumerate(chunks)
        ]

    def is_reusable(self, file: ImageFile) -> bool:
        return file.sha256 in self.old_rows

    def load(self, batch: _Batch) -> Tensor:
        """The batch's pixels, uint8 (n, h, w, 3), on the CPU; pinned where they go on to a GPU."""
        import torch

        if not batch.places:
            return torch.empty(0)
        images = torch.from_numpy(self.read(batch.files))
        return images.pin_memory() if self.device.type == "cuda" else images

    def take_over(self, making: _Making) -> list[int]:
        """Fill in the rows that an earlier folder has; the places of those that are to be encoded."""
        kept = [place for place, file in enumerate(making.shard.files) if self.is_reusable(file)]
        if self.old is not None and kept:
            old = self.old[[self.old_rows[making.shard.files[place].sha256] for place in kept]]
            for place, row in zip(kept, old, strict=True):
                making.rows[place] = row
        return [place for place, row in enumerate(making.rows) if row is None]

    def moments(self, images: Tensor, batch: _Batch) -> Tensor:
        """float16 (n, orientations, 2 c, h, w) on the CPU, of pixels (n, h, w, 3)."""
        import torch

        moments = torch.cat([self._oriented(part.to(self.device, non_blocking=True)) for part in self._parts(images)])
        largest = moments.abs().flatten(1).amax(1).float().cpu()  # NaN where a value is NaN
        for file, value in zip(batch.files, largest.tolist(), strict=True):
            if not value <= _LARGEST:
                raise ValueError(
                    f"{file.path} ({file.sha256[:12]}): the largest of its moments is {value:g}, which float16 cannot "
                    "hold; encode in float32 or bf16 (some autoencoders, SDXL's among them, overflow in fp16)"
                )
        return moments.half().cpu()

    def _parts(self, images: Tensor) -> Sequence[Tensor]:
        """What is encoded at once: on a CPU parts of even size, since in float32 very small ones round otherwise."""
        if self.device.type != "cpu":
            return [images]
        most = max(1, min(_CPU_BATCH, _CPU_BATCH * 256**2 // self.config.size_px**2))
        return images.tensor_split(-(-len(images) // most))

    def _oriented(self, images: Tensor) -> Tensor:
        """Moments (n, orientations, 2 c, h, w) of pixels (n, h, w, 3)."""
        import torch

        pixels = to_model_range(images)
        oriented = [torch.cat(self.encode(orient(pixels, k)), dim=1) for k in range(self.config.orientations)]
        return torch.stack(oriented, dim=1)


@dataclass
class _Making:
    """A shard that this process is making: the claim is its locked file, free again as soon as the process is gone."""

    shard: _Shard
    claim: IO[str]
    rows: list[Tensor | None]

    def finish(self) -> None:
        import torch

        with self.claim:
            self.shard.write(torch.stack([row for row in self.rows if row is not None]))
            self.shard.lock.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Batch:
    """Images of one shard that are encoded at once; none where the whole shard is reused."""

    making: _Making
    places: Sequence[int]
    last: bool

    @property
    def files(self) -> list[ImageFile]:
        return [self.making.shard.files[place] for place in self.places]


def _make(
    shards: Sequence[_Shard], work: _Work, on_progress: Callable[[int, int], None] | None, *, wait: bool = False
) -> None:
    """Make those of the shards that no other process is making; with `wait`, also those that one is and then is not."""
    with ExitStack() as held, closing(_ahead(_batches(shards, work, held, wait), work.load)) as batches:
        for batch, images in batches:
            if batch.places:
                for place, row in zip(batch.places, work.moments(images, batch), strict=True):
                    batch.making.rows[place] = row
            if batch.last:
                batch.making.finish()
                if on_progress:
                    done = sum(len(shard.files) for shard in work.shards if shard.path.exists())
                    on_progress(done, len(work.files))


def _batches(shards: Sequence[_Shard], work: _Work, held: ExitStack, wait: bool) -> Iterator[_Batch]:
    """Claim the shards one after another; what of each is to be encoded, the rest of its rows being taken over."""
    for shard in shards:
        claim = _claim(shard, wait=wait)
        if claim is None:
            continue
        held.enter_context(claim)
        making = _Making(shard, claim, [None] * len(shard.files))
        fresh = work.take_over(making)
        size = work.config.batch_size
        for start in range(0, max(1, len(fresh)), size):
            yield _Batch(making, fresh[start : start + size], last=start + size >= len(fresh))


def _claim(shard: _Shard, *, wait: bool) -> IO[str] | None:
    """The shard's lock, held; None where the shard is there, or another process holds it and `wait` is not asked."""
    if shard.path.exists():
        return None
    handle = shard.lock.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        handle.close()
        return None
    if shard.path.exists():  # finished meanwhile; only then is a lock file ever removed
        shard.lock.unlink(missing_ok=True)
        handle.close()
        return None
    return handle


def _ahead(batches: Iterator[_Batch], load: Callable[[_Batch], Tensor]) -> Generator[tuple[_Batch, Tensor]]:
    """Every batch with its pixels, read by another thread that is never more than `_AHEAD` batches ahead."""
    waiting: deque[tuple[_Batch, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="latents") as reader:
        try:
            for batch in batches:
                waiting.append((batch, reader.submit(load, batch)))
                if len(waiting) > _AHEAD:
                    first, pixels = waiting.popleft()
                    yield first, pixels.result()
            while waiting:
                first, pixels = waiting.popleft()
                yield first, pixels.result()
        finally:
            for _, pixels in waiting:
                pixels.cancel()


def _earlier(folder: Path | None, config: LatentConfig) -> tuple[dict[str, int], Moments | None]:
    if folder is None:
        return {}, None
    digests, moments = open_moments(folder)
    if moments.shape[1] != config.orientations:
        raise ValueError(
            f"{folder} holds {moments.shape[1]} orientations, not {config.orientations}: nothing of it can be reused"
        )
    return {digest: row for row, digest in enumerate(digests)}, moments


def _plan(files: Sequence[ImageFile], config: LatentConfig) -> str:
    how = config.model_dump_json(include={"size_px", "geometry", "orientations"})
    return hashlib.sha256("\n".join([how, *(file.sha256 for file in files)]).encode()).hexdigest()


def _check(shards: Iterable[_Shard]) -> None:
    from safetensors import SafetensorError, safe_open

    for shard in shards:
        try:
            with safe_open(shard.path, framework="pt") as handle:
                plan = (handle.metadata() or {}).get("plan")
        except SafetensorError as error:
            raise ValueError(f"{shard.path} is damaged ({error}): remove it and run again") from error
        if plan != shard.plan:
            raise ValueError(
                f"{shard.path} holds moments of other images, or of the same in another way: remove it and run again"
            )


def _write_index(work: _Work) -> None:
    index = pa.table(
        {
            "sha256": pa.array([file.sha256 for file in work.files], pa.string()),
            "shard": pa.array([shard.number for shard in work.shards for _ in shard.files], pa.int64()),
            "row": pa.array([row for shard in work.shards for row in range(len(shard.files))], pa.int64()),
        }
    )
    path = work.out / INDEX
    with path.with_name(f".{INDEX}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not path.exists() or not pq.read_table(path).equals(index):
            write_table(path, index)
    for lock in work.out.glob(".*.lock"):  # all is there: none is needed any more, those of killed processes included
        lock.unlink(missing_ok=True)
