"""Pixels => moments => latents: reading images in batches, shards of VAE moments, and their statistics.

Moments (mean and log-variance) are stored, not samples: noise is drawn and latents are whitened when they are used
(Karras et al. 2024, EDM2). This module does not know any autoencoder: it is handed one as a function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.images import Geometry, Pixels, decode, read_bytes, to_square
from derm_pipeline.store import replacing, write_table

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.parquet"


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
    """Images encoded at once."""


@dataclass(frozen=True)
class ImageFile:
    """An image to be read, with the digest that its bytes must have."""

    path: Path
    sha256: str


Restore = Callable[[Pixels, str], Pixels]
"""(image, its sha256) -> the image without its artefacts: hair removal, where a recipe asks for it."""


def read_squares(
    files: Sequence[ImageFile],
    *,
    size_px: int,
    geometry: Geometry = "crop",
    restore: Restore | None = None,
    num_threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Read images as squares, (n, size_px, size_px, 3) uint8 RGB, several at a time.

    Raises:
        ValueError: a file's bytes are no longer those that its record describes.
    """
    squares = np.empty((len(files), size_px, size_px, 3), np.uint8)

    def read(position: int) -> None:
        squares[position] = _read_square(files[position], size_px, geometry, restore)

    with ThreadPoolExecutor(num_threads) as pool:
        for done, _ in enumerate(pool.map(read, range(len(files))), start=1):
            if on_progress and (done % 256 == 0 or done == len(files)):
                on_progress(done, len(files))
    return squares


def _read_square(file: ImageFile, size_px: int, geometry: Geometry, restore: Restore | None) -> npt.NDArray[np.uint8]:
    content = read_bytes(file.path)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ValueError(f"{file.path} was changed after its record was made: materialise `records` again")
    if restore is None:
        return to_square(decode(content, reduce_to_px=size_px), size_px, geometry)
    return to_square(restore(decode(content), file.sha256), size_px, geometry)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 (n, h, w, 3) in [0, 255] -> float32 (n, 3, h, w) in [-1, +1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> Pixels:
    """Float (n, 3, h, w) in [-1, +1] -> uint8 (n, h, w, 3): clamp(127.5 x + 128, 0, 255), as public DiT samplers."""
    import torch

    scaled = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    pixels: Pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def orient(images: Tensor, orientation: int) -> Tensor:
    """One of 8 orientations of a batch (n, c, h, w): 2 k is turned by k x 90 degrees, 2 k + 1 is also mirrored."""
    import torch

    turned = torch.rot90(images, orientation // 2, (2, 3))
    return turned.flip(3) if orientation % 2 else turned


def encode_images(
    files: Sequence[ImageFile],
    read: Callable[[Sequence[ImageFile]], Pixels],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    config: LatentConfig,
    *,
    out: Path,
    previous: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the moments of every image to `out`, in shards with an index, and return how many rows were reused.

    A shard is float16 `moments` (n, orientations, 2 c, h, w): mean and log-variance. Shards already in `out` (of an
    interrupted run) are kept. Rows of `previous`, an earlier folder made with the same encoder and config, are copied
    by digest.

    Args:
        files: the images; the index keeps their order.
        read: images -> uint8 (n, size_px, size_px, 3).
        encode: float32 (n, 3, size_px, size_px) in [-1, +1] -> mean and log-variance, each (n, c, h, w).
        config: sizes and orientations.
        out: folder to write to.
        previous: folder of an earlier artifact to reuse rows of.
        on_progress: called with (images done, images in all).
    """
    out.mkdir(parents=True, exist_ok=True)
    old = _Rows(previous) if previous else None
    shards = [files[start : start + config.shard_size] for start in range(0, len(files), config.shard_size)]
    index: dict[str, list[str | int]] = {"sha256": [], "shard": [], "row": []}
    num_reused = done = 0
    for number, shard in enumerate(shards):
        reusable = [old is not None and file.sha256 in old.position for file in shard]
        num_reused += sum(reusable)
        path = out / _shard_name(number)
        if not path.exists():
            _write_shard(path, _shard_moments(shard, reusable, old, read, encode, config))
        index["sha256"] += [file.sha256 for file in shard]
        index["shard"] += [number] * len(shard)
        index["row"] += range(len(shard))
        done += len(shard)
        if on_progress:
            on_progress(done, len(files))
    write_table(out / INDEX, pa.table(index))
    return num_reused


def load_moments(folder: Path) -> tuple[list[str], Tensor]:
    """The image digests and all moments of a folder of shards: float16 (n, orientations, 2 c, h, w)."""
    import torch
    from safetensors.torch import load_file

    index = pq.read_table(folder / INDEX)
    shards = [load_file(folder / _shard_name(number))["moments"] for number in sorted(set(index["shard"].to_pylist()))]
    return index["sha256"].to_pylist(), torch.cat(shards)


def latent_statistics(moments: Tensor) -> dict[str, list[float]]:
    """Per-channel mean and standard deviation of the latents of these moments (n, o, 2 c, h, w), in float64.

    The variance of a latent is the variance of the means plus the mean of the variances.
    """
    mean, logvar = moments.double().chunk(2, dim=2)
    axes = (0, 1, 3, 4)
    variance = mean.var(axes, unbiased=False) + logvar.exp().mean(axes)
    return {"mean": mean.mean(axes).tolist(), "std": variance.sqrt().tolist()}


class _Rows:
    """Random access to the rows of an earlier folder of shards."""

    def __init__(self, folder: Path) -> None:
        index = pq.read_table(folder / INDEX).to_pydict()
        self.folder = folder
        self.position: Mapping[str, tuple[int, int]] = {
            digest: (shard, row)
            for digest, shard, row in zip(index["sha256"], index["shard"], index["row"], strict=True)
        }

    def take(self, digests: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
        """(place in `digests`, moments (orientations, 2 c, h, w)), one shard opened at a time."""
        from safetensors import safe_open

        places = sorted(range(len(digests)), key=lambda place: self.position[digests[place]])
        opened, rows = -1, None
        for place in places:
            shard, row = self.position[digests[place]]
            if shard != opened:
                with safe_open(self.folder / _shard_name(shard), framework="pt") as handle:
                    rows = handle.get_tensor("moments")
                opened = shard
            assert rows is not None
            yield place, rows[row]


def _shard_moments(
    shard: Sequence[ImageFile],
    reusable: Sequence[bool],
    old: _Rows | None,
    read: Callable[[Sequence[ImageFile]], Pixels],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    config: LatentConfig,
) -> Tensor:
    import torch

    fresh = [place for place, reuse in enumerate(reusable) if not reuse]
    kept = [place for place, reuse in enumerate(reusable) if reuse]
    rows: list[Tensor | None] = [None] * len(shard)
    for start in range(0, len(fresh), config.batch_size):
        places = fresh[start : start + config.batch_size]
        images = to_model_range(torch.from_numpy(read([shard[place] for place in places])))
        moments = torch.stack(
            [torch.cat(encode(orient(images, k)), dim=1) for k in range(config.orientations)], dim=1
        ).half()
        for place, row in zip(places, moments, strict=True):
            rows[place] = row
    if old is not None:
        for position, row in old.take([shard[place].sha256 for place in kept]):
            rows[kept[position]] = row
    return torch.stack([row for row in rows if row is not None])


def _write_shard(path: Path, moments: Tensor) -> None:
    from safetensors.torch import save_file

    with replacing(path) as aside:
        save_file({"moments": moments.contiguous()}, aside)


def _shard_name(number: int) -> str:
    return f"moments-{number:05d}.safetensors"
