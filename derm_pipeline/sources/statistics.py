"""What is measured in every image while it is scanned: brightness, sharpness, what it looks like, the skin's colour.

Everything is measured on the image squashed to `WORK_PX` x `WORK_PX`, so that a whole batch is one array, and so that
figures of images of different sizes can be compared. What is estimated here is never a label: it stands in a table of
its own and fills no record.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from derm_pipeline.images import Pixels
from derm_pipeline.records import Modality, SkinType

WORK_PX = 128
"""Side of the squashed images that are measured; 4 x `_SMALL_PX`."""
THUMBNAIL_PX = 16
"""Side of the thumbnails that are kept; `_SMALL_PX` / 2."""

STATISTICS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("mean_red", pa.float32(), nullable=False),
        pa.field("mean_green", pa.float32(), nullable=False),
        pa.field("mean_blue", pa.float32(), nullable=False),
        pa.field("std_red", pa.float32(), nullable=False),
        pa.field("std_green", pa.float32(), nullable=False),
        pa.field("std_blue", pa.float32(), nullable=False),
        pa.field("sharpness", pa.float32(), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("thumbnail", pa.binary(THUMBNAIL_PX**2), nullable=False),
        pa.field("ita_deg", pa.float32()),
        pa.field("estimated_skin_type", pa.int32()),
    ]
)
"""Column names and types of the `statistics` table: one row a record, in the records' order.

Mean and standard deviation are of each channel, 0 to 255. See `sharpness`, `perceptual_hashes`, `thumbnails`,
`skin_ita_degrees` and `estimated_skin_types`. The last column stays last."""

MEASURED = (
    *("mean_red", "mean_green", "mean_blue", "std_red", "std_green", "std_blue"),
    *("sharpness", "phash", "thumbnail", "ita_deg"),
)
"""The columns that follow from the pixels alone."""

ItaClass = Literal["very light", "light", "intermediate", "tan", "brown", "dark"]
ITA_BANDS: tuple[tuple[float, ItaClass, SkinType], ...] = (
    (55, "very light", SkinType.I),
    (41, "light", SkinType.II),
    (28, "intermediate", SkinType.III),
    (10, "tan", SkinType.IV),
    (-30, "brown", SkinType.V),
    (-181, "dark", SkinType.VI),
)
"""Lower end of each ITA class in degrees (Del Bino and Bernerd 2013, doi:10.1111/bjd.12529), and the Fitzpatrick type
that we estimate from it: the n-th class is type n. That is a convention: ITA measures colour, Fitzpatrick asks how skin
burns."""


def ita_degrees(lightness: float, b: float) -> float:
    """Individual typology angle atan2(L* - 50, b*) in degrees (Chardon et al. 1991); 90 when both are 0 or b* is."""
    return float(np.degrees(np.arctan2(lightness - 50, max(b, 1e-6))))


def ita_class(ita_deg: float) -> tuple[ItaClass, SkinType]:
    """The ITA class of an angle in degrees, and the Fitzpatrick type it suggests; bounds belong to the darker class."""
    for lower, tone, skin_type in ITA_BANDS:
        if ita_deg > lower:
            return tone, skin_type
    raise ValueError(f"an ITA of {ita_deg} is not an angle in degrees")


def measure(images: Pixels) -> pa.RecordBatch:
    """The columns `MEASURED` for a batch of images (n, WORK_PX, WORK_PX, 3); a row does not depend on the others."""
    if images.ndim != 4 or images.shape[1:] != (WORK_PX, WORK_PX, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8 (n, {WORK_PX}, {WORK_PX}, 3), not {images.dtype} {'x'.join(map(str, images.shape))}"
        )
    grey = np.empty(images.shape[:3], np.uint8)
    small = np.empty((len(images), _SMALL_PX, _SMALL_PX, 3), np.uint8)
    moments = np.empty((len(images), 6))
    for row, image in enumerate(images):  # OpenCV on one image is many times faster than NumPy on the batch
        cv2.cvtColor(image, cv2.COLOR_RGB2GRAY, dst=grey[row])
        cv2.resize(image, (_SMALL_PX, _SMALL_PX), dst=small[row], interpolation=cv2.INTER_AREA)
        moments[row] = np.concatenate(cv2.meanStdDev(image)).ravel()
    kept = [one.tobytes() for one in thumbnails(small)]
    columns = [*moments.T, sharpness(grey), perceptual_hashes(small), kept, skin_ita_degrees(small)]
    schema = pa.schema([STATISTICS_SCHEMA.field(name) for name in MEASURED])
    arrays = [pa.array(column, field.type, from_pandas=True) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def estimated_skin_types(ita_deg: pa.Array | pa.ChunkedArray, modality: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The Fitzpatrick type (int32) that each angle suggests; null for a null angle and for endoscopic images."""
    pairs = zip(ita_deg.to_pylist(), modality.to_pylist(), strict=True)
    types = [
        None if angle is None or what == Modality.ENDOSCOPIC else int(ita_class(angle)[1]) for angle, what in pairs
    ]
    return pa.array(types, pa.int32())


_SMALL_PX = 32


def sharpness(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Variance of the 4-neighbour Laplacian of grey images (n, h, w), (n,): low when blurred (Pech-Pacheco 2000)."""
    return np.array([cv2.meanStdDev(cv2.Laplacian(image, cv2.CV_16S, ksize=1))[1].item() ** 2 for image in grey])


_LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue (ITU-R BT.601)."""


def _dct_rows(first: int, last: int) -> npt.NDArray[np.float64]:
    """Rows first..last-1 of the orthonormal DCT-II matrix of size `_SMALL_PX`."""
    place, frequency = np.arange(_SMALL_PX), np.arange(first, last)[:, None]
    return np.sqrt(2 / _SMALL_PX) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SMALL_PX))


_LOW = _dct_rows(1, 9)


def perceptual_hashes(images: Pixels) -> npt.NDArray[np.uint64]:
    """The DCT hash of Zauner 2010 (pHash), (n,): alike for images that look alike, whatever their size or compression.

    Of the DCT of the images (n, 32, 32, 3) in grey the 8 x 8 lowest coefficients, without those of frequency 0 in
    either direction; a bit is 1 where the coefficient is above their median, the lowest frequency in the highest bit.
    An image of one colour has the hash 0. A mirrored, turned or much cropped image has another hash.
    """
    grey = np.asarray(images @ _LUMA)
    low = _LOW @ grey @ _LOW.T
    low = np.round(low.reshape(len(images), 64), 3)  # so that rounding errors decide no bit of a flat image
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).reshape(len(images))


def thumbnails(images: Pixels) -> Pixels:
    """The images (n, 32, 32, 3) in grey, (n, 16, 16): from 0, each one's darkest pixel, to 255, its brightest.

    Stretched so that an image of little contrast loses no more to rounding than others; all 0 for an image whose pixels
    are less than one of 256 grey levels apart. 256 bytes an image; `duplicates` compares them. Whole numbers only, so
    that neither the batch nor the machine changes a pixel.
    """
    fours = sum(images[:, row::2, column::2].astype(np.int64) for row in (0, 1) for column in (0, 1))
    grey = fours @ np.array([299, 587, 114])
    darkest = grey.min((1, 2), keepdims=True)
    width = grey.max((1, 2), keepdims=True) - darkest
    stretched = ((grey - darkest) * 255 + width // 2) // np.maximum(width, 1)
    return np.where(width < _ONE_LEVEL, 0, stretched).astype(np.uint8)


_ONE_LEVEL = 4 * 1000
"""One grey level in the sums of `thumbnails`: of four pixels, weighted by 1000 in all."""


def _ring() -> npt.NDArray[np.bool_]:
    """Pixels away from the centre, where a lesion hardly reaches, (32, 32)."""
    across = (np.arange(_SMALL_PX) + 0.5) / _SMALL_PX * 2 - 1
    return np.asarray(np.hypot(across[:, None], across) > _RING_FROM)


_RING_FROM = 0.75
_DARK = 0.45
_LIGHTER = (0.5, 0.8)
_MIN_SKIN_PX = 20
_RING = _ring()


def skin_ita_degrees(images: Pixels) -> npt.NDArray[np.float64]:
    """Estimated individual typology angle of the skin, degrees, (n,); NaN where hardly any skin is seen.

    Skin is looked for in the outer part of each image (n, 32, 32, 3): without what the instrument does not see (pixels
    much darker than the image's bright ones), its lighter half, which leaves out hair, ink and a lesion that reaches
    the edge, but not its lightest fifth, which holds the glare. L* and b* are means over these. It is a colour as the
    camera gave it: right on phantoms (98 % of 1,000 in the drawn skin type's class, all within one), but HAM10000's
    pink cast makes 85 % of its images very light.
    """
    if not len(images):
        return np.empty(0)
    lab = cv2.cvtColor(images.reshape(-1, _SMALL_PX, 3).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lab = lab.reshape(len(images), _SMALL_PX * _SMALL_PX, 3)
    bright = np.sort(lab[..., 0], axis=1)[:, round(0.9 * _SMALL_PX**2)]
    outer = lab[:, _RING.ravel()]
    lightness = np.where(outer[..., 0] > _DARK * bright[:, None], outer[..., 0], np.inf)
    order = np.argsort(lightness, axis=1, kind="stable")
    num_seen = np.isfinite(lightness).sum(1, keepdims=True)
    rank = np.arange(lightness.shape[1])
    chosen = (rank >= np.floor(_LIGHTER[0] * num_seen)) & (rank < np.ceil(_LIGHTER[1] * num_seen))
    ranked = np.take_along_axis(outer.astype(np.float64), order[..., None], axis=1)
    means = (ranked * chosen[..., None]).sum(1) / np.maximum(chosen.sum(1), 1)[:, None]
    angle = np.degrees(np.arctan2(means[:, 0] - 50, np.maximum(means[:, 2], 1e-6)))
    is_skin = (num_seen[:, 0] >= _MIN_SKIN_PX) & (means[:, 0] > _MIN_LIGHTNESS)
    return np.where(is_skin, np.round(angle, 2), np.nan)


_MIN_LIGHTNESS = 8.0
"""L* below which a picture is black rather than of dark skin."""
