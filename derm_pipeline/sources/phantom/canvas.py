"""The phantom drawer's paper and pens: coordinates, noise fields, strokes, blending.

Everything is placed in units of the image's width, so the same content can be drawn at any size. A random number is
never drawn per output pixel, for the same reason. Noise and structures lie in the lesion's own frame, which a second
photograph moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]
"""One number per pixel, (h, w)."""
Rgb = npt.NDArray[np.float32]
"""One colour, (3,), 0 to 255."""

_STROKE_PX = 800
"""Strokes are drawn at least this wide and reduced, so that a hair 1 px wide keeps its true coverage."""
_SHIFT = 4
"""Fractional bits of OpenCV's drawing coordinates."""
_FIELD_PX = 160
"""Noise fields are summed at this size before they are laid over the image."""
_FIELD_SPAN = 1.6
"""Side of the square that a field covers, in image widths."""


@dataclass(frozen=True)
class Pose:
    """Where one photograph sees the lesion: centre (image widths from the image's centre), rotation, magnification."""

    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0
    zoom: float = 1.0


def rgb(red: float, green: float, blue: float) -> Rgb:
    """A colour, 0 to 255 each."""
    return np.array((red, green, blue), np.float32)


def smoothstep(values: npt.NDArray[np.floating], low: float, high: float) -> Plane:
    """0 below `low`, 1 above `high`, smooth between; `low` > `high` falls instead of rising."""
    t = np.clip((np.asarray(values, np.float32) - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


class Canvas:
    """An image (h, w, 3) of float32 in 0 to 255 under construction, and the lesion's coordinates over it."""

    def __init__(self, width_px: int, height_px: int, colour: Rgb, pose: Pose) -> None:
        self.width_px, self.height_px, self.pose = width_px, height_px, pose
        self.image = np.empty((height_px, width_px, 3), np.float32)
        self.image[:] = colour
        self.x = ((np.arange(width_px, dtype=np.float32) + 0.5) / width_px - 0.5)[None, :]
        self.y = ((np.arange(height_px, dtype=np.float32) + 0.5 - height_px / 2) / width_px)[:, None]
        """Image coordinates from the centre, in image widths, as a row and a column."""
        cos, sin = math.cos(pose.angle) / pose.zoom, math.sin(pose.angle) / pose.zoom
        dx, dy = self.x - pose.x, self.y - pose.y
        self.u: Plane = np.asarray(cos * dx + sin * dy, np.float32)
        self.v: Plane = np.asarray(cos * dy - sin * dx, np.float32)
        """The lesion's coordinates, in image widths at zoom 1."""

    def blend(self, colour: Rgb, alpha: npt.NDArray[np.floating]) -> None:
        """Move every pixel towards `colour` by `alpha` (h, w) in 0 to 1."""
        plane = np.asarray(alpha, np.float32)
        # OpenCV merges planes several times faster than NumPy broadcasts one over three channels.
        self.multiply(1 - plane)
        self.image += cv2.merge([plane * channel for channel in np.asarray(colour, np.float32)])

    def multiply(self, factor: npt.NDArray[np.floating]) -> None:
        """Scale every pixel by `factor` (h, w)."""
        plane = np.asarray(factor, np.float32)
        self.image *= cv2.merge((plane, plane, plane))

    def field(self, rng: np.random.Generator, cells: int, octaves: int = 3) -> Plane:
        """Smooth noise (h, w) fixed to the lesion: mean 0, spread about 1, `cells` a width in its coarsest octave."""
        total = np.zeros((_FIELD_PX, _FIELD_PX), np.float32)
        weight, power = 1.0, 0.0
        for octave in range(octaves):
            side = min(round(cells * _FIELD_SPAN) * 2**octave, _FIELD_PX)
            grid = rng.standard_normal((side, side), dtype=np.float32)
            total += np.float32(weight) * cv2.resize(grid, (_FIELD_PX, _FIELD_PX), interpolation=cv2.INTER_CUBIC)
            power += weight**2
            weight *= 0.5
        # A cubic interpolation of unit noise keeps about 0.55 of its variance.
        return self._lay(total * np.float32(1 / math.sqrt(0.55 * power)))

    def _lay(self, field: Plane) -> Plane:
        pose, scale = self.pose, _FIELD_PX / _FIELD_SPAN
        cos, sin = math.cos(pose.angle) / pose.zoom * scale, math.sin(pose.angle) / pose.zoom * scale
        x0 = 0.5 / self.width_px - 0.5 - pose.x
        y0 = (0.5 - self.height_px / 2) / self.width_px - pose.y
        middle = _FIELD_PX / 2 - 0.5
        step = 1 / self.width_px
        matrix = np.array(
            [
                [cos * step, sin * step, cos * x0 + sin * y0 + middle],
                [-sin * step, cos * step, cos * y0 - sin * x0 + middle],
            ]
        )
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        size = (self.width_px, self.height_px)
        return np.asarray(cv2.warpAffine(field, matrix, size, flags=flags, borderMode=cv2.BORDER_REFLECT), np.float32)

    def grain(self, rng: np.random.Generator, cells: int) -> Plane:
        """Noise (h, w) fixed to the image rather than to the lesion, `cells` a width, unit spread before enlarging."""
        rows = max(2, round(cells * self.height_px / self.width_px))
        grid = rng.standard_normal((rows, cells), dtype=np.float32)
        size = (self.width_px, self.height_px)
        interpolation = cv2.INTER_AREA if cells > self.width_px else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(grid, size, interpolation=interpolation), np.float32)

    def strokes(self) -> Strokes:
        """An empty layer to draw strokes and spots on."""
        return Strokes(self)

    def blur(self, alpha: Plane, sigma: float) -> Plane:
        """Gaussian blur; `sigma` in image widths."""
        return np.asarray(cv2.GaussianBlur(alpha, (0, 0), max(0.3, sigma * self.width_px)), np.float32)

    def to_image(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Lesion coordinates (n, 2) to image coordinates (n, 2) from the image's centre, both in image widths."""
        cos, sin = math.cos(self.pose.angle) * self.pose.zoom, math.sin(self.pose.angle) * self.pose.zoom
        turn = np.array([[cos, sin], [-sin, cos]])
        return points @ turn + np.array([self.pose.x, self.pose.y])


class Strokes:
    """A layer of coverage: ribbons, ellipses and text, drawn finely and reduced to the canvas."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.factor = max(1, math.ceil(_STROKE_PX / canvas.width_px))
        self.scale = canvas.width_px * self.factor
        self.layer = np.zeros((canvas.height_px * self.factor, self.scale), np.uint8)

    def _fixed(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        middle = np.array([self.layer.shape[1], self.layer.shape[0]]) / 2 - 0.5
        return np.round((points * self.scale + middle) * (1 << _SHIFT)).astype(np.int32)

    def ribbon(
        self, points: npt.NDArray[np.float64], widths: npt.NDArray[np.float64] | float, strength: float = 1.0
    ) -> None:
        """A band along `points` (n, 2) in image coordinates, `widths` (n,) wide, both in image widths."""
        along = np.gradient(points, axis=0)
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
        # The rim of an antialiased polygon reaches half a pixel too far on either side.
        half = np.maximum(np.asarray(widths) / 2 - 0.5 / self.scale, 0.2 / self.scale)
        aside = along[:, ::-1] * np.array([-1, 1]) * np.broadcast_to(half, len(points))[:, None]
        outline = self._fixed(np.concatenate([points + aside, (points - aside)[::-1]]))
        cv2.fillPoly(self.layer, [outline], round(255 * strength), cv2.LINE_AA, _SHIFT)

    def spot(
        self, centre: npt.NDArray[np.float64], radii: tuple[float, float], degrees: float, strength: float
    ) -> None:
        """A filled ellipse at `centre` (2,) in image coordinates; `radii` in image widths."""
        x, y = (int(value) for value in self._fixed(centre[None])[0])
        axes = (max(1, round(radii[0] * self.scale * 16)), max(1, round(radii[1] * self.scale * 16)))
        level = round(255 * strength)
        cv2.ellipse(self.layer, (x, y), axes, degrees, 0, 360, level, cv2.FILLED, cv2.LINE_AA, _SHIFT)

    def ring(self, centre: npt.NDArray[np.float64], radius: float, width: float, arc: tuple[float, float]) -> None:
        """Part of a circle, `arc` in degrees, `radius` and `width` in image widths."""
        angles = np.radians(np.linspace(arc[0], arc[1], 25))
        self.ribbon(centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1), width)

    def text(self, words: str, at: npt.NDArray[np.float64], height: float) -> None:
        """A word whose lower left corner is at `at` (2,); `height` in image widths."""
        x, y = (int(value) for value in self._fixed(at[None])[0] >> _SHIFT)
        size = height * self.scale / 21  # the Hershey font is 21 px tall at scale 1
        thickness = max(1, round(size * 2))
        cv2.putText(self.layer, words, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, 255, thickness, cv2.LINE_AA)

    def alpha(self) -> Plane:
        """Coverage (h, w), 0 to 1."""
        size = (self.canvas.width_px, self.canvas.height_px)
        reduced = self.layer if self.factor == 1 else cv2.resize(self.layer, size, interpolation=cv2.INTER_AREA)
        return np.asarray(reduced, np.float32) * np.float32(1 / 255)


def curve(
    start: npt.NDArray[np.float64], angle: float, length: float, bend: float, num_points: int = 20
) -> npt.NDArray[np.float64]:
    """Points (num_points, 2) of an arc from `start`, of `length`, that turns by `bend` radians."""
    angles = angle + bend * np.linspace(-0.5, 0.5, num_points - 1)
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) * length / (num_points - 1)
    return np.concatenate([start[None], start + np.cumsum(steps, axis=0)])
