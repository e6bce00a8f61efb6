"""Image files to squares of pixels, and pixels to the range of a network and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from derm_pipeline.images import Geometry, Pixels, decode, read_bytes, to_square
from derm_pipeline.sources.base import num_cores

if TYPE_CHECKING:
    from torch import Tensor


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
    num_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Read images as squares, (n, size_px, size_px, 3) uint8 RGB, as many at a time as there are cores.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where its short side stays at least `size_px`; not where `restore` is given,
    which sees the whole image.

    Raises:
        ValueError: a file's bytes are no longer those that its record describes.
    """
    squares = np.empty((len(files), size_px, size_px, 3), np.uint8)

    def read(position: int) -> None:
        squares[position] = _read_square(files[position], size_px, geometry, restore)

    with ThreadPoolExecutor(num_threads or num_cores()) as pool:
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
