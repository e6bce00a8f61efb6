"""Pixels in and out: bounded decoding of untrusted files, the named geometries, pictures for people.

Images are uint8 RGB arrays (h, w, 3) everywhere outside a network. Nothing here knows what a lesion is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
"""uint8 RGB, (h, w, 3) or a batch (n, h, w, 3)."""

Geometry = Literal["crop", "squash", "pad"]
"""How an image becomes square: ADM centre crop, squashed, or padded with black."""

MAX_PIXELS = 100_000_000
MAX_BYTES = 256 * 1024**2
FORMATS = {"JPEG", "PNG"}
SUFFIXES = {".jpg", ".jpeg", ".png"}


class BadImageError(ValueError):
    """A file that is not a usable image; the message says why."""


def read_bytes(path: Path) -> bytes:
    """The file's bytes, refused when missing, empty or larger than `MAX_BYTES`."""
    if not path.is_file():
        raise BadImageError("the file is missing on disk")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise BadImageError("the file is empty (zero bytes)")
    if size_bytes > MAX_BYTES:
        raise BadImageError(f"the file has {size_bytes:,} bytes; at most {MAX_BYTES:,} are read")
    return path.read_bytes()


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS, reduce_to_px: int | None = None) -> Pixels:
    """Decode a JPEG or PNG to RGB, all of it or not at all.

    The header is looked at before any pixel is decoded, so an image bomb costs nothing. With `reduce_to_px` a JPEG may
    be decoded at 1/2, 1/4 or 1/8, as long as its short side stays at least that long. EXIF rotation is applied.

    Raises:
        BadImageError: not a JPEG or PNG, too many pixels, or broken.
    """
    with _opened(content, max_pixels) as image:
        size = image.size
    return _decode(content, size, reduce_to_px)


def decode_strictly(
    content: bytes, *, max_pixels: int = MAX_PIXELS, reduce_to_px: int | None = None
) -> tuple[Pixels, tuple[int, int]]:
    """Decode as `decode` does, and refuse a file that ends early or is damaged; every row is looked at.

    Two decoders must agree. OpenCV's is that of every later stage, but it fills in what is missing; Pillow's refuses
    that. Pillow reads a JPEG at 1/8 and in grey: all of its data is decoded all the same, only the pixels are fewer.

    Returns:
        The pixels, and (width, height) as the header says, which is before any reduction and rotation.

    Raises:
        BadImageError: not a JPEG or PNG, too many pixels, truncated or broken.
    """
    with _opened(content, max_pixels) as image:
        size = image.size
        image.draft("L", (max(1, size[0] // 8), max(1, size[1] // 8)))
        try:
            image.load()
        except (OSError, ValueError, SyntaxError) as error:
            raise BadImageError(f"the image is truncated or broken ({error})") from error
    return _decode(content, size, reduce_to_px), size


def _opened(content: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=tuple(FORMATS))
    except Image.DecompressionBombError as error:
        raise BadImageError(f"the image has more than {max_pixels:,} pixels; no more are read") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImageError("the file is not a JPEG or PNG image") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise BadImageError(f"the image has {width:,} x {height:,} pixels; at most {max_pixels:,} are read")
    return image


def _decode(content: bytes, size: tuple[int, int], reduce_to_px: int | None) -> Pixels:
    flag = cv2.IMREAD_COLOR_RGB
    if reduce_to_px is not None:
        for factor, reduced in (
            (8, cv2.IMREAD_REDUCED_COLOR_8),
            (4, cv2.IMREAD_REDUCED_COLOR_4),
            (2, cv2.IMREAD_REDUCED_COLOR_2),
        ):
            if min(size) >= reduce_to_px * factor:
                flag = reduced
                break
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    if pixels is None:
        raise BadImageError("the image data is broken")
    if flag != cv2.IMREAD_COLOR_RGB:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS, reduce_to_px: int | None = None) -> Pixels:
    """Read one image file as RGB (h, w, 3); see `decode`."""
    return decode(read_bytes(path), max_pixels=max_pixels, reduce_to_px=reduce_to_px)


def to_square(image: Pixels, size_px: int, geometry: Geometry = "crop") -> Pixels:
    """Make an image (h, w, 3) square with side `size_px`.

    crop: the centre crop of ADM (Dhariwal and Nichol 2021): halve with a box filter while the short side is
    at least twice the target, then bicubic so that the short side is the target, then crop the centre.
    squash: area or cubic resize that ignores the aspect ratio. pad: fit inside, black around.
    """
    if geometry == "crop":
        return _adm_crop(image, size_px)
    if geometry == "squash":
        return _resize(image, size_px, size_px)
    height, width = image.shape[:2]
    scale = size_px / max(height, width)
    inner = _resize(image, max(1, round(width * scale)), max(1, round(height * scale)))
    square = np.zeros((size_px, size_px, 3), np.uint8)
    top, left = (size_px - inner.shape[0]) // 2, (size_px - inner.shape[1]) // 2
    square[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return square


def _adm_crop(image: Pixels, size_px: int) -> Pixels:
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size_px:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size_px / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size_px) // 2, (picture.height - size_px) // 2
    return np.asarray(picture.crop((left, top, left + size_px, top + size_px)))


def _resize(image: Pixels, width_px: int, height_px: int) -> Pixels:
    shrinking = width_px * height_px < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width_px, height_px), interpolation=interpolation), dtype=np.uint8)


def contact_sheet(images: Pixels, *, columns: int, gap_px: int = 2) -> Pixels:
    """Tile a batch (n, h, w, 3) row by row into one picture on white."""
    count, height, width = images.shape[:3]
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap_px) + gap_px, columns * (width + gap_px) + gap_px, 3), 255, np.uint8)
    for position, image in enumerate(images):
        top = gap_px + (position // columns) * (height + gap_px)
        left = gap_px + (position % columns) * (width + gap_px)
        sheet[top : top + height, left : left + width] = image
    return sheet


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """PNG bytes of an RGB (h, w, 3) or grey (h, w) image; the same pixels give the same bytes."""
    if image.ndim == 3:
        image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), dtype=np.uint8)
    ok, encoded = cv2.imencode(".png", image)
    assert ok
    return encoded.tobytes()


def encode_jpeg(image: Pixels, *, quality: int = 90) -> bytes:
    """JPEG bytes of an RGB image (h, w, 3)."""
    ok, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return encoded.tobytes()
