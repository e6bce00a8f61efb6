"""Hair over the lesion: where it is, how much of it, and the image without it.

The detector looks for thin dark lines at one fixed working size, so its answer does not depend on how large the image
came: a black-hat finds what is thin and darker than its surroundings, an opening by a short line in several directions
keeps what is long. Three things that look like hair are taken out again: pigment networks (many small closed cells),
vessels (red, not dark) and rulers (a straight line with teeth). All lengths are fractions of the image's long side.

The law of `melanoma_sdxl` (004) is kept beside it for comparison; it counts raw pixels of contour and fails when the
size changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.images import Pixels

Mask = npt.NDArray[np.bool_]
"""One truth value per pixel, (h, w)."""
_Grey = npt.NDArray[np.uint8]

CONTOUR_LIMIT_PX = 4000
"""Total contour length above which 004 calls an image hairy."""
_CONTOUR_MIN_PX = 100
_TOOTH_LENGTH = 0.03
"""How far a ruler's teeth reach beside its line, as a fraction of the long side."""
_MIN_TEETH = 6


class HairConfig(BaseModel):
    """How hair is found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["oriented", "canny_004"] = "oriented"
    """oriented: thin dark lines at a fixed working size. canny_004: 004's contour length in raw pixels."""
    hairy_score: float = Field(default=0.6, ge=0)
    """Score (total hair length in image diagonals) from which an image is hairy; oriented only. On phantoms not used to
    choose it, 4 of 361 images without hair scored as much and none of 359 with hair scored less (hair_accuracy.py
    --seed 424242 --images-per-size 400 200 120). One or two faint hairs score less."""
    working_long_side_px: int = Field(default=400, ge=200, le=2000)
    """Every image is brought to this long side first, pixels. A hair must be a pixel wide there."""
    hair_width: float = Field(default=0.0145, gt=0, le=0.1)
    """Widest hair, as a fraction of the long side."""
    line_length: float = Field(default=0.05, gt=0, le=0.5)
    """Length of the line that must fit into a hair, as a fraction of the long side."""
    num_directions: int = Field(default=16, ge=4, le=32)
    """Directions of that line."""
    min_contrast: float = Field(default=8, gt=0, le=255)
    """How much darker than its surroundings a hair is at least, grey levels."""
    full_contrast: float = Field(default=20, gt=0, le=255)
    """Mean contrast from which a hair counts with all of its length, grey levels."""
    min_length: float = Field(default=0.06, gt=0, le=1)
    """Shortest hair, as a fraction of the long side."""
    full_length: float = Field(default=0.16, gt=0, le=1)
    """Length from which a hair counts with all of it; a shorter one counts in part, as a fraction of the long side."""
    min_elongation: float = Field(default=4, ge=1)
    """Length of a hair over its width, at least."""
    min_weight: float = Field(default=0.1, gt=0, le=1)
    """A line enters the mask when it counts with at least this share of its length; the score counts all."""
    redness: float = Field(default=0.5, ge=0, le=4)
    """How strongly contrast in green that red does not show (a vessel) is held against a line."""
    cell_size: float = Field(default=0.045, gt=0, le=0.5)
    """Largest cell of a pigment network, as a fraction of the long side."""
    cell_contrast: float = Field(default=14, gt=0, le=255)
    """How much darker than its cells the lines of a pigment network are at least, grey levels."""
    cell_share: float = Field(default=0.4, gt=0)
    """Where closed cells cover this much of the lines' own area, there is a network."""
    ruler_length: float = Field(default=0.25, gt=0, le=1)
    """Shortest straight line that may be a ruler, as a fraction of the long side."""


@dataclass(frozen=True)
class Hair:
    """The hair of one image."""

    mask: Mask
    """(h, w) at the image's own size."""
    coverage: float
    """Share of the image's pixels in the mask, 0 to 1."""
    score: float
    """Total length of hair in image diagonals, at least 0."""
    is_hairy: bool


def detect_hair(image: Pixels, config: HairConfig | None = None) -> Hair:
    """Find the hair in an RGB image (h, w, 3) of any size.

    A large file may be decoded reduced first (`read_image(..., reduce_to_px=config.working_long_side_px)`); the mask
    then has the reduced size. Dark hair is found, and fair hair where it is darker than what it lies on.

    Raises:
        ValueError: not a uint8 RGB image.
    """
    config = config or HairConfig()
    _check(image)
    if config.method == "canny_004":
        return _detect_by_contours(image)
    height, width = image.shape[:2]
    scale = config.working_long_side_px / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = np.asarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)
    darkness = _thin_darkness(small, config)
    lines = _line_response(darkness, config)
    candidates = (lines >= config.min_contrast) & ~_network(darkness, config)
    found, length_px = _select(candidates, lines, darkness, config)
    mask = _refine(found, darkness, width, height)
    score = float(length_px / np.hypot(*found.shape))
    return Hair(mask, float(mask.mean()), score, score >= config.hairy_score)


def remove_hair(image: Pixels, mask: Mask, *, margin: float = 0.004, reach: float = 0.01) -> Pixels:
    """Paint over the masked pixels from their surroundings (Telea 2004, as OpenCV's inpainting).

    Args:
        image: RGB (h, w, 3).
        mask: (h, w), what to remove.
        margin: how far the mask is widened first, as a fraction of the long side: a hair's rim is blurred.
        reach: how far around a pixel is looked for colour, as a fraction of the long side.

    Raises:
        ValueError: the image is not uint8 RGB, or the mask has another size.
    """
    _check(image)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask has shape {mask.shape}, the image {image.shape[:2]}; they must be equal")
    if not mask.any():
        return image.copy()
    long_side = max(mask.shape)
    kernel = _disc(2 * max(1, round(margin * long_side)) + 1)
    wide = cv2.dilate(mask.astype(np.uint8), kernel)
    return np.asarray(cv2.inpaint(image, wide, max(2.0, reach * long_side), cv2.INPAINT_TELEA), np.uint8)


def contour_length_px(image: Pixels) -> float:
    """004's measure of hair, in raw pixels of the image (h, w, 3) as given; above 4,000 it calls the image hairy.

    Grey, 5 x 5 Gaussian, Canny 50/250, external contours, open arc length; contours of at least 100 px are summed.
    """
    _check(image)
    return float(sum(length for _, length in _long_contours(image)))


def _check(image: Pixels) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"hair needs a uint8 RGB image (h, w, 3), not {image.dtype} of shape {image.shape}")


def _long_contours(image: Pixels) -> list[tuple[npt.NDArray[np.int32], float]]:
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 5), 0)
    contours, _ = cv2.findContours(cv2.Canny(grey, 50, 250), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    measured = [(np.asarray(contour, np.int32), float(cv2.arcLength(contour, False))) for contour in contours]
    return [(contour, length) for contour, length in measured if length >= _CONTOUR_MIN_PX]


def _detect_by_contours(image: Pixels) -> Hair:
    contours = _long_contours(image)
    drawn = np.zeros(image.shape[:2], np.uint8)
    cv2.drawContours(drawn, [contour for contour, _ in contours], -1, 1, 1)
    total_px = sum(length for _, length in contours)
    score = float(total_px / np.hypot(*image.shape[:2]))
    return Hair(drawn > 0, float(drawn.mean()), score, total_px > CONTOUR_LIMIT_PX)


def _thin_darkness(image: Pixels, config: HairConfig) -> _Grey:
    """How much darker (h, w) each pixel is than the wider surroundings of a thin line through it.

    Hair is dark in red as in green; a vessel is dark in green only, and that difference is held against it.
    """
    kernel = _disc(_odd(config.hair_width * config.working_long_side_px))
    # The border is repeated outward: a sliver of vignette at the image's edge is then wide, not thin.
    pad = len(kernel)
    wide = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    red, green = (
        cv2.morphologyEx(cv2.extractChannel(wide, c), cv2.MORPH_BLACKHAT, kernel)[pad:-pad, pad:-pad] for c in (0, 1)
    )
    vessel = cv2.convertScaleAbs(cv2.subtract(green, red), alpha=config.redness)
    return np.asarray(cv2.subtract(red, vessel), np.uint8)


def _line_response(darkness: _Grey, config: HairConfig) -> _Grey:
    """The darkness (h, w) that a short line through each pixel keeps all along, in its best direction."""
    best = np.zeros_like(darkness)
    for kernel in _lines(_odd(config.line_length * config.working_long_side_px), config.num_directions):
        opened = cv2.morphologyEx(darkness, cv2.MORPH_OPEN, kernel, borderType=cv2.BORDER_REPLICATE)
        cv2.max(best, opened, best)
    return best


def _network(darkness: _Grey, config: HairConfig) -> Mask:
    """Where (h, w) dark lines enclose many small cells: a pigment network, not hair."""
    side = config.working_long_side_px
    dark = (darkness >= config.cell_contrast).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - dark, connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA]
    is_cell = (areas >= 3) & (areas < (config.cell_size * side) ** 2)
    is_cell[0] = False  # label 0 is the dark lines
    cells = is_cell.astype(np.uint8)[labels] * np.uint8(255)
    window = (_odd(0.06 * side),) * 2
    share = cv2.blur(cells, window, borderType=cv2.BORDER_CONSTANT)
    lines = cv2.blur(dark * np.uint8(255), window, borderType=cv2.BORDER_CONSTANT)
    dense = ((share > config.cell_share * lines.astype(np.float32)) & (share > 10)).astype(np.uint8)
    return np.asarray(cv2.dilate(dense, np.ones((_odd(0.03 * side),) * 2, np.uint8)) > 0)


def _select(candidates: Mask, lines: _Grey, darkness: _Grey, config: HairConfig) -> tuple[Mask, float]:
    """Keep the connected lines that are hair: their mask (h, w) and their total weighted length, pixels."""
    side = config.working_long_side_px
    binary = candidates.astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA].astype(float)
    depth = np.bincount(labels.ravel(), cv2.distanceTransform(binary, cv2.DIST_L2, 3).ravel(), count)
    # In a band of width w the mean distance to the rim is (w + 1) / 4, for distances counted from the pixels outside.
    width = np.maximum(4 * depth / area - 1, 1)
    length = area / width
    contrast = np.bincount(labels.ravel(), lines.ravel(), count) / area
    weight = np.clip((contrast - config.min_contrast) / (config.full_contrast - config.min_contrast), 0, 1)
    weight *= np.clip((length / side - config.min_length) / (config.full_length - config.min_length), 0, 1)
    weight[length < config.min_elongation * width] = 0
    weight[0] = 0
    dark = np.argwhere(darkness >= config.cell_contrast)[:, ::-1].astype(np.float32)
    for label in np.flatnonzero((weight > 0) & (length > config.ruler_length * side)):
        left, top, wide, high = stats[label, :4]
        inside = labels[top : top + high, left : left + wide] == label
        points = np.argwhere(inside)[:, ::-1].astype(np.float32) + np.array([left, top], np.float32)
        if _is_ruler(points / side, dark / side):
            weight[label] = 0
    return np.asarray((weight >= config.min_weight)[labels]), float((weight * length).sum())


def _is_ruler(points: npt.NDArray[np.floating], dark: npt.NDArray[np.floating]) -> bool:
    """Whether the line through `points` (n, 2) is straight with even teeth of `dark` pixels (m, 2); in long sides."""
    sample = np.ascontiguousarray(points[:: max(1, len(points) // 150)], np.float32)
    dx, dy, x, y = cv2.fitLine(sample, cv2.DIST_L1, 0, 1e-3, 1e-3).ravel()
    if (np.abs((points[:, 0] - x) * dy - (points[:, 1] - y) * dx) < _TOOTH_LENGTH).mean() < 0.9:
        return False
    along = (points[:, 0] - x) * dx + (points[:, 1] - y) * dy
    start, end = float(along.min()), float(along.max())
    position = (dark[:, 0] - x) * dx + (dark[:, 1] - y) * dy
    beside = ((dark[:, 0] - x) * dy - (dark[:, 1] - y) * dx) / _TOOTH_LENGTH
    for side in (1, -1):
        strip = (side * beside > 0.4) & (side * beside < 0.7)
        if _is_even(np.histogram(position[strip], bins=round(400 * (end - start)), range=(start, end))[0] > 0):
            return True
    return False


def _is_even(occupied: Mask) -> bool:
    """Whether the runs of True in (n,) begin at even distances, six of them or more."""
    starts = np.flatnonzero(np.diff(occupied.astype(np.int8), prepend=0) == 1)
    if len(starts) < _MIN_TEETH:
        return False
    gaps = np.diff(starts)
    return bool((np.abs(gaps - np.median(gaps)) <= np.maximum(1, 0.2 * np.median(gaps))).mean() >= 0.7)


def _refine(found: Mask, darkness: _Grey, width: int, height: int) -> Mask:
    """The mask (height, width) at the image's size: what is at least half as dark as the hair it belongs to."""
    if not found.any():
        return np.zeros((height, width), bool)
    near = cv2.dilate(found.astype(np.uint8), np.ones((3, 3), np.uint8))
    crest = cv2.dilate(darkness * near, np.ones((5, 5), np.uint8))
    interpolation = cv2.INTER_AREA if max(width, height) < max(found.shape) else cv2.INTER_LINEAR
    size = (width, height)
    local = cv2.resize(darkness, size, interpolation=interpolation)
    limit = cv2.resize(crest, size, interpolation=cv2.INTER_LINEAR)
    region = cv2.resize(near, size, interpolation=cv2.INTER_NEAREST)
    return np.asarray((region > 0) & (local > 0) & (local >= 0.5 * limit.astype(np.float32)))


def _odd(value: float) -> int:
    return max(3, round(value) | 1)


def _disc(size_px: int) -> _Grey:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size_px, size_px)), np.uint8)


@lru_cache(maxsize=16)
def _lines(size_px: int, num_directions: int) -> tuple[_Grey, ...]:
    """Line-shaped kernels (size_px, size_px), evenly spread over half a turn."""
    middle = size_px // 2
    kernels = []
    for direction in range(num_directions):
        angle = np.pi * direction / num_directions
        dx, dy = round(np.cos(angle) * middle), round(np.sin(angle) * middle)
        kernel = np.zeros((size_px, size_px), np.uint8)
        cv2.line(kernel, (middle - dx, middle - dy), (middle + dx, middle + dy), 1, 1)
        kernels.append(kernel)
    return tuple(kernels)
