"""The images that samples begin from, as the generator's autoencoder sees them, and what of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from derm_pipeline.captions.segmentation import see
from derm_pipeline.images import Geometry, Pixels, to_square
from derm_pipeline.latents import ImageFile
from derm_pipeline.sources.ham10000 import read_lesion_mask

Mask = npt.NDArray[np.bool_]

_KEPT = 64
"""Images held in memory: samples of one image follow each other."""


class Begun(NamedTuple):
    """An image to begin from."""

    pixels: Pixels
    """(size_px, size_px, 3), as the recipe's latents are made of it."""
    lesion: Mask | None
    """Where its lesion is, (size_px, size_px), to be kept; nowhere, if none was found. None where all is drawn anew."""


class ReadOrigin(Protocol):
    """Gives an image by the sha256 of its file."""

    def __call__(self, sha256: str, /) -> Begun: ...


class OriginImages:
    """Reads training images to begin from; see `Img2ImgSampling.lesion` for what is kept of them."""

    def __init__(
        self,
        files: Mapping[str, ImageFile],
        read: Callable[[Sequence[ImageFile]], Pixels],
        *,
        geometry: Geometry,
        lesion: Literal["drawn", "kept", "kept_as_found"] = "drawn",
        masks: Mapping[str, Path] | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            files: The images, by their sha256.
            read: Reads images as the recipe's latents are made of them: (n, size_px, size_px, 3).
            geometry: How it makes them square, so that masks are made so, too.
            lesion: "kept" needs `masks`.
            masks: The source's own masks of the lesions, by the image's sha256.
        """
        self._files, self._masks, self._read_squares = files, masks or {}, read
        self._geometry, self._lesion = geometry, lesion
        self._read = lru_cache(maxsize=_KEPT)(self._read_anew)

    def __call__(self, sha256: str, /) -> Begun:
        """The image of this sha256.

        Raises:
            ValueError: there is no such image, it was changed since, or its source has no mask of the lesion.
        """
        return self._read(sha256)

    def _read_anew(self, sha256: str) -> Begun:
        if sha256 not in self._files:
            raise ValueError(f"no training image has the sha256 {sha256}")
        file = self._files[sha256]
        pixels = self._read_squares([file])[0]
        if self._lesion == "drawn":
            return Begun(pixels, None)
        mask = self._source_mask(file, len(pixels)) if self._lesion == "kept" else _found_mask(pixels)
        return Begun(pixels, mask)

    def _source_mask(self, file: ImageFile, size_px: int) -> Mask:
        if file.sha256 not in self._masks:
            raise ValueError(
                f"{file.path}: its source has no mask of the lesion; set synthetic_dataset.lesion to kept_as_found, "
                "or to drawn"
            )
        mask = read_lesion_mask(self._masks[file.sha256]).astype(np.uint8) * 255
        return to_square(np.repeat(mask[..., None], 3, axis=2), size_px, self._geometry)[..., 0] >= 128


def _found_mask(pixels: Pixels) -> Mask:
    found = see(pixels).lesion.astype(np.float32)
    return np.asarray(cv2.resize(found, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR) >= 0.5)


def cells_of(begun: Begun, side: int) -> Mask:
    """The latent cells (side, side) of which the lesion to be kept covers at least half; none without one."""
    if begun.lesion is None:
        return np.zeros((side, side), np.bool_)
    covered = cv2.resize(begun.lesion.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(covered >= 0.5)
