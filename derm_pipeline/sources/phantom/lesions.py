"""How the phantom drawer paints each diagnosis: shape, colours and dermoscopic structures.

One painter a diagnosis, in the terms of the third consensus conference on dermoscopy (Kittler et al. 2016): a nevus has
a regular pigment network, a melanoma several colours, a blue-white veil and streaks on one side, and so on. Colours are
those on very light skin; on darker skin they are scaled by a power of the skin's own darkening, weaker for what is pale
or red by nature.

A subtle lesion is drawn as its own picture faded into that of a nondescript brown patch with the same outline. Nothing
but the fading and the outline depends on the subtlety, so a lesion changes continuously with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from derm_pipeline.records import Diagnosis
from derm_pipeline.sources.phantom.canvas import Canvas, Plane, Rgb, Strokes, curve, rgb, smoothstep

_LIGHT_SKIN = rgb(232, 198, 180)
_TABLE = 2048
"""Directions in which an outline's radius is tabulated."""
_PLAIN_RADIUS, _PLAIN_ROUGHNESS = (0.14, 0.21), 0.045
"""Outline of the nondescript patch, as in `_Kind`."""
_FADING = 0.8
"""Weight of the nondescript patch: `_Kind.faded` * subtlety ** `_FADING`."""
_DARK_HIDDEN = 0.12
"""How much of a subtle lesion's contrast black skin would swallow."""
_HIDDEN = {
    "blue-white veil": 0.75,
    "blue-grey nests": 0.75,
    "arborising vessels": 0.7,
    "lacunae": 0.75,
    "central white patch": 0.65,
    "milia-like cysts": 0.7,
    "several colours": 0.6,
    "streaks": 0.5,
    "sharp border": 0.5,
    "strawberry pattern": 0.5,
}
"""Weight of the nondescript patch from which a structure can no longer be named."""
_HIDDEN_OTHERS = 0.6


@dataclass
class Lesion:
    """A lesion under construction on a canvas."""

    canvas: Canvas
    darkening: Rgb
    """The skin's colour relative to very light skin, (3,) in 0 to 1."""
    radius: float
    """Mean radius, image widths."""
    inside: Plane
    """Depth below the outline (h, w): 1 in the middle, 0 on the outline, negative outside."""
    outline: npt.NDArray[np.float64]
    """The outline's points (n, 2) in lesion coordinates."""
    typical: npt.NDArray[np.float64]
    """The outline's points (n, 2) at subtlety 0."""

    def tint(self, colour: Rgb, power: float = 0.75) -> Rgb:
        """The colour as it shows on this skin; a pigment darkens with it (high `power`), a scar hardly does."""
        return np.asarray(colour * self.darkening**power, np.float32)

    def body(self, softness: float) -> Plane:
        """Coverage (h, w) of the lesion with a border `softness` wide, as a fraction of its radius."""
        return smoothstep(self.inside, -softness, softness)

    def scatter(self, rng: np.random.Generator, count: int, reach: float, gap: float = 0.0) -> npt.NDArray[np.float64]:
        """Up to `count` points (n, 2) in the inner `reach` of the lesion (lesion coordinates).

        They are at least `gap` apart on the typical outline, so that the subtlety moves but never removes one.
        """
        points: list[npt.NDArray[np.float64]] = []
        moved: list[npt.NDArray[np.float64]] = []
        for _ in range(count * (6 if gap else 1)):
            if len(points) == count:
                break
            rim, depth = rng.integers(len(self.outline)), reach * math.sqrt(rng.uniform())
            point = self.typical[rim] * depth
            if all(np.hypot(*(point - other)) >= gap for other in points):
                points.append(point)
                moved.append(self.outline[rim] * depth)
        return np.array(moved)


def _outlined(canvas: Canvas, rng: np.random.Generator, kind: _Kind, plainness: float) -> Lesion:
    """An outline made of a stretched circle and harmonics, `plainness` of the way to the nondescript patch's."""
    size = rng.uniform()
    own, plain = (low + size * (high - low) for low, high in (kind.radius, _PLAIN_RADIUS))
    radius = own + plainness * (plain - own)
    roughness = kind.roughness + plainness * (_PLAIN_ROUGHNESS - kind.roughness)
    directions = np.arange(_TABLE) * (2 * math.pi / _TABLE)
    order = np.arange(2, 2 + kind.waves)
    height, phase = rng.normal(0, 1, kind.waves) / order**0.75, rng.uniform(0, 2 * math.pi, kind.waves)
    bumps = np.clip((height[:, None] * np.cos(order[:, None] * directions + phase[:, None])).sum(axis=0), -1.6, 1.6)
    stretch, tilt = rng.uniform(0, 0.2), rng.uniform(0, math.pi)
    round_edge = 1 + stretch * np.cos(2 * (directions - tilt))
    edge = radius * (round_edge + roughness * bumps)
    around = np.stack([np.cos(directions), np.sin(directions)], axis=1)[::32]
    outline = edge[::32, None] * around
    typical = own * (round_edge + kind.roughness * bumps)[::32, None] * around
    position = np.arctan2(canvas.v, canvas.u) * np.float32(_TABLE / (2 * math.pi))
    reach = edge.astype(np.float32)[position.astype(np.int32) % _TABLE]
    distance = np.sqrt(canvas.u**2 + canvas.v**2)
    ragged = np.float32(0.25 * roughness + 0.012) * canvas.field(rng, 14, 3)
    inside = np.asarray(1 - distance / reach + ragged, np.float32)
    return Lesion(canvas, np.ones(3, np.float32), radius, inside, outline, typical)


def _honeycomb(canvas: Canvas, rng: np.random.Generator, period: float, wobble: float) -> Plane:
    """A hexagonal lattice (h, w): 1 in the middle of a cell, 0 on the lines between; bent by `wobble` periods."""
    turn = rng.uniform(0, math.pi)
    bend = canvas.field(rng, 5, 2), canvas.field(rng, 5, 2)
    u = canvas.u + np.float32(wobble * period) * bend[0]
    v = canvas.v + np.float32(wobble * period) * bend[1]
    total = np.zeros_like(u)
    pitch = 4 * math.pi / (math.sqrt(3) * period)
    for step in range(3):
        angle = turn + step * 2 * math.pi / 3
        total += np.cos(np.float32(pitch * math.cos(angle)) * u + np.float32(pitch * math.sin(angle)) * v)
    return np.asarray((total + 1.5) / 4.5, np.float32)


def _spots(
    lesion: Lesion,
    rng: np.random.Generator,
    points: npt.NDArray[np.float64],
    radius: tuple[float, float],
    *,
    oblong: float = 0.25,
    strength: float = 1.0,
) -> Plane:
    """Coverage (h, w) of ellipses at `points` (n, 2), `radius` from .. to in image widths."""
    strokes, zoom = lesion.canvas.strokes(), lesion.canvas.pose.zoom
    for centre in lesion.canvas.to_image(points) if len(points) else points:
        size, flat = zoom * rng.uniform(*radius), 1 - rng.uniform(0, oblong)
        strokes.spot(centre, (size, size * flat), rng.uniform(0, 180), strength * rng.uniform(0.8, 1))
    return strokes.alpha()


def _varied(rng: np.random.Generator, colour: Rgb, spread: float = 7.0) -> Rgb:
    return np.asarray(colour * np.float32(1 + rng.normal(0, spread / 130)) + rng.normal(0, spread / 2, 3), np.float32)


def _paint_nv(lesion: Lesion, rng: np.random.Generator) -> tuple[str, ...]:
    canvas, body = lesion.canvas, lesion.body(0.18)
    brown = (rgb(162, 100, 66), rgb(146, 90, 62), rgb(172, 96, 74))[rng.integers(3)]
    canvas.blend(lesion.tint(_varied(rng, brown), 0.85), 0.86 * body)
    depth = lesion.inside + 0.1 * canvas.field(rng, 7)
    middle = smoothstep(depth, 0.05, 0.8) * rng.uniform(0.2, 0.6)
    canvas.blend(lesion.tint(rgb(92, 52, 36), 0.85), middle)
    cells = _honeycomb(canvas, rng, rng.uniform(0.034, 0.043), 0.5)
    patchy = 0.5 + 0.5 * smoothstep(canvas.field(rng, 6), -0.9, 0.7)
    lines = smoothstep(cells, 0.46, 0.14) * smoothstep(lesion.inside, -0.14, 0.22) * patchy
    canvas.blend(lesion.tint(rgb(70, 40, 28), 0.9), 0.74 * lines)
    return ("pigment network",)


def _paint_mel(lesion: Lesion, rng: np.random.Generator) -> tuple[str, ...]:
    canvas, body = lesion.canvas, lesion.body(0.07)
    side = rng.uniform(0, 2 * math.pi)
    across = (math.cos(side) * canvas.u + math.sin(side) * canvas.v) / lesion.radius
    canvas.blend(lesion.tint(_varied(rng, rgb(146, 94, 66)), 0.85), 0.92 * body)
    dark = smoothstep(canvas.field(rng, 6, 4) + 0.8 * across, -0.7, 0.7) * body
    canvas.blend(lesion.tint(_varied(rng, rgb(74, 42, 34)), 0.9), 0.9 * dark)
    _streaks(lesion, rng, side)
    black = smoothstep(canvas.field(rng, 8, 4) + 0.6 * across, 0.3, 1.3) * body
    canvas.blend(lesion.tint(rgb(28, 20, 22), 0.9), 0.92 * black)
    red = smoothstep(canvas.field(rng, 6) - 0.9 * across, 0.7, 1.7) * body
    canvas.blend(lesion.tint(rgb(186, 104, 94), 0.6), 0.65 * red)
    toward = np.array([math.cos(side), math.sin(side)])
    centre = lesion.radius * (rng.uniform(-0.25, 0.25, 2) + 0.15 * toward)
    away = np.hypot(canvas.u - centre[0], canvas.v - centre[1]) / lesion.radius
    veil = smoothstep(away + 0.16 * canvas.field(rng, 7, 4), 0.68, 0.2)
    canvas.blend(lesion.tint(_varied(rng, rgb(122, 132, 162), 4), 0.3), 0.9 * veil * body)
    return ("blue-white veil", "several colours", "streaks")


def _streaks(lesion: Lesion, rng: np.random.Generator, side: float) -> None:
    strokes = lesion.canvas.strokes()
    for rim in lesion.outline:
        apart = abs((math.atan2(rim[1], rim[0]) - side + math.pi) % (2 * math.pi) - math.pi)
        length, wide = rng.uniform(1.0, 1.17), rng.uniform(0.012, 0.022)
        if apart < 1.3:
            path = lesion.canvas.to_image(rim * np.linspace(0.78, length, 6)[:, None])
            strokes.ribbon(path, np.linspace(wide, 0.005, 6) * lesion.canvas.pose.zoom)
    lesion.canvas.blend(lesion.tint(rgb(58, 36, 30), 0.9), 0.8 * lesion.canvas.blur(strokes.alpha(), 0.003))


def _paint_bcc(lesion: Lesion, rng: np.random.Generator) -> tuple[str, ...]:
    canvas, body = lesion.canvas, lesion.body(0.14)
    mottle = canvas.field(rng, 8, 4)
    canvas.blend(lesion.tint(_varied(rng, rgb(232, 168, 164)), 0.5), np.clip(0.78 + 0.12 * mottle, 0, 1) * body)
    pearl = smoothstep(lesion.inside + 0.05 * mottle, -0.08, 0.12) * smoothstep(lesion.inside, 0.4, 0.1)
    canvas.blend(lesion.tint(rgb(250, 222, 216), 0.4), 0.4 * pearl)
    nests = _spots(lesion, rng, lesion.scatter(rng, int(rng.integers(4, 8)), 0.75, 0.055), (0.016, 0.042), oblong=0.5)
    nests = canvas.blur(nests, 0.006) * np.clip(0.9 + 0.15 * mottle, 0, 1)
    canvas.blend(lesion.tint(_varied(rng, rgb(80, 84, 108), 5), 0.45), 0.9 * nests)
    vessels = canvas.strokes()
    for _ in range(rng.integers(3, 6)):
        rim = lesion.outline[rng.integers(len(lesion.outline))]
        _branch(vessels, rng, lesion, rim * 0.98, math.atan2(-rim[1], -rim[0]), 1.1 * lesion.radius, 0.010, 3)
    canvas.blend(lesion.tint(rgb(188, 40, 54), 0.5), 0.8 * canvas.blur(vessels.alpha(), 0.0015))
    if rng.uniform() < 0.3:
        crust = _spots(lesion, rng, lesion.scatter(rng, 2, 0.5), (0.012, 0.026), oblong=0.5)
        canvas.blend(lesion.tint(rgb(170, 92, 46), 0.6), 0.85 * canvas.blur(crust, 0.004))
    return ("arborising vessels", "blue-grey nests")


def _branch(
    strokes: Strokes,
    rng: np.random.Generator,
    lesion: Lesion,
    start: npt.NDArray[np.float64],
    angle: float,
    length: float,
    width: float,
    depth: int,
) -> None:
    """One vessel that forks `depth` times, thinner each time."""
    path = curve(start, angle + rng.normal(0, 0.25), length * rng.uniform(0.7, 1), rng.normal(0, 0.9), 8)
    zoom = lesion.canvas.pose.zoom
    strokes.ribbon(lesion.canvas.to_image(path), np.linspace(width, 0.6 * width, 8) * zoom)
    if depth == 0:
        return
    for sign in (-1, 1):
        at = path[rng.integers(3, 7)]
        turn = angle + sign * rng.uniform(0.4, 0.9)
        _branch(strokes, rng, lesion, at, turn, 0.55 * length, 0.62 * width, depth - 1)


def _paint_akiec(lesion: Lesion, rng: np.random.Generator) -> tuple[str, ...]:
    canvas, body = lesion.canvas, lesion.body(0.3)
    patchy = np.clip(0.8 + 0.12 * canvas.field(rng, 8, 4), 0, 1)
    canvas.blend(lesion.tint(_varied(rng, rgb(218, 118, 106)), 0.5), patchy * body)
    blotch = smoothstep(canvas.field(rng, 7, 4), -0.2, 1.4)
    canvas.blend(lesion.tint(rgb(184, 70, 72), 0.5), 0.65 * blotch * body)
    cells = _honeycomb(canvas, rng, rng.uniform(0.044, 0.056), 0.6)
    follicles = smoothstep(cells, 0.58, 0.86) * smoothstep(lesion.inside + 0.15 * canvas.field(rng, 9), 0.0, 0.3)
    canvas.blend(lesion.tint(rgb(246, 220, 190), 0.4), 0.72 * follicles)
    flakes = smoothstep(canvas.field(rng, 16, 4), 0.9, 1.8) * smoothstep(lesion.inside, 0.0, 0.3)
    canvas.blend(lesion.tint(rgb(250, 238, 218), 0.3), 0.8 * flakes)
    return ("scale", "strawberry pattern")


def _paint_bkl(lesion: Lesion, rng: np.random.Generator) -> tuple[str, ...]:
    canvas, body = lesion.canvas, lesion.body(0.04)
    tan = (rgb(186, 136, 84), rgb(168, 116, 74), rgb(194, 148, 98))[rng.integers(3)]
    canvas.blend(lesion.tint(_varied(rng, tan), 0.8), 0.93 * body)
    canvas.blend(lesion.tint(rgb(128, 82, 50), 0.85), 0.5 * smoothstep(canvas.field(rng, 8, 4), 0.0, 1.4) * body)
    ridges = smoothstep(np.abs(canvas.field(rng, 10, 3)), 0.36, 0.0)
    canvas.blend(lesion.tint(rgb(104, 66, 40), 0.85), 0.6 * ridges * body)
    rim = smoothstep(lesion.inside, 0.2, 0.02) * body
    canvas.blend(lesion.tint(rgb(112, 72, 44), 0.85), 0.45 * rim)
    plugs = _spots(lesion, rng, lesion.scatter(rng, int(rng.integers(4, 9)), 0.85, 0.035), (0.008, 0.015))
    canvas.blend(lesion.tint(rgb(66, 38, 26), 0.8), 0.85 * canvas.blur(plugs, 0.002))
    cysts = _spots(lesion, rng, lesion.scatter(rng, int(rng.integers(9, 18)), 0.88, 0.035), (0.008, 0.014), oblong=0.1)
    canvas.blend(lesion.tint(rgb(255, 244, 212), 0.25), 0.95 * canvas.blur(cysts, 0.003))
    return ("comedo-like openings", "milia-like cysts", "sharp border")


def _paint_df(lesion: Lesion, rng: np.random.Generator) -> tuple[str, ...]:
    canvas, body = lesion.canvas, lesion.body(0.26)
    mottle = canvas.field(rng, 7, 4)
    canvas.blend(lesion.tint(_varied(rng, rgb(192, 134, 104)), 0.75), np.clip(0.76 + 0.1 * mottle, 0, 1) * body)
    cells = _honeycomb(canvas, rng, rng.uniform(0.031, 0.037), 0.5)
    ring = smoothstep(lesion.inside, -0.18, 0.12) * smoothstep(lesion.inside, 0.62, 0.4)
    canvas.blend(lesion.tint(rgb(118, 74, 52), 0.85), 0.62 * smoothstep(cells, 0.44, 0.14) * ring)
    depth = lesion.inside + 0.07 * mottle
    canvas.blend(lesion.tint(_varied(rng, rgb(248, 230, 222), 4), 0.3), 0.88 * smoothstep(depth, 0.32, 0.66))
    return ("central white patch", "peripheral network")


def _paint_vasc(lesion: Lesion, rng: np.random.Generator) -> tuple[str, ...]:
    canvas, body = lesion.canvas, lesion.body(0.08)
    canvas.blend(lesion.tint(_varied(rng, rgb(202, 88, 102)), 0.5), 0.9 * body)
    haze = smoothstep(canvas.field(rng, 8, 4), 0.0, 1.4) * body
    canvas.blend(lesion.tint(rgb(236, 198, 206), 0.4), 0.5 * haze)
    reds = (rgb(156, 16, 38), rgb(124, 14, 48), rgb(92, 16, 62), rgb(50, 14, 44))
    first = int(rng.integers(0, 3))
    points = lesion.scatter(rng, int(rng.integers(11, 18)), 0.86, 0.052)
    shares = np.array_split(points, [2 * len(points) // 3])
    inner = smoothstep(lesion.inside, -0.04, 0.06)
    for colour, share in zip(reds[first : first + 2], shares, strict=True):
        lacunae = canvas.blur(_spots(lesion, rng, share, (0.019, 0.036), oblong=0.35), 0.0035)
        canvas.blend(lesion.tint(_varied(rng, colour, 4), 0.45), 0.95 * lacunae * inner)
    return ("lacunae",)


def _paint_plain(lesion: Lesion, rng: np.random.Generator) -> None:
    """A brown patch that could be anything: uneven, a little darker inside, with a hint of a network."""
    canvas, body = lesion.canvas, lesion.body(rng.uniform(0.1, 0.22))
    uneven = canvas.field(rng, 7)
    brown = _varied(rng, rgb(152, 98, 72), 12)
    canvas.blend(lesion.tint(brown, 0.85), rng.uniform(0.7, 0.9) * body)
    depth = lesion.inside + 0.2 * uneven
    canvas.blend(lesion.tint(0.62 * brown, 0.85), rng.uniform(0.1, 0.6) * smoothstep(depth, 0.0, 0.8))
    pale = smoothstep(canvas.field(rng, 8), 0.2, 1.8) * body
    canvas.blend(lesion.tint(1.3 * brown, 0.7), rng.uniform(0.0, 0.5) * pale)
    lines = smoothstep(_honeycomb(canvas, rng, rng.uniform(0.033, 0.05), 0.6), 0.46, 0.14)
    lines *= smoothstep(lesion.inside + 0.1 * uneven, -0.1, 0.3)
    canvas.blend(lesion.tint(0.5 * brown, 0.9), rng.uniform(0.05, 0.4) * lines)


@dataclass(frozen=True)
class _Kind:
    paint: Callable[[Lesion, np.random.Generator], tuple[str, ...]]
    radius: tuple[float, float]
    roughness: float
    waves: int
    faded: float
    """How much of it subtlety 1 hides, 0 to 1; an early melanoma is the likest to a nevus."""


_KINDS: dict[Diagnosis, _Kind] = {
    Diagnosis.AKIEC: _Kind(_paint_akiec, (0.18, 0.25), 0.10, 6, 0.80),
    Diagnosis.BCC: _Kind(_paint_bcc, (0.16, 0.23), 0.07, 5, 0.76),
    Diagnosis.BKL: _Kind(_paint_bkl, (0.16, 0.24), 0.08, 11, 0.84),
    Diagnosis.DF: _Kind(_paint_df, (0.13, 0.18), 0.03, 3, 0.68),
    Diagnosis.MEL: _Kind(_paint_mel, (0.18, 0.25), 0.17, 8, 0.90),
    Diagnosis.NV: _Kind(_paint_nv, (0.13, 0.21), 0.03, 4, 0.88),
    Diagnosis.VASC: _Kind(_paint_vasc, (0.13, 0.20), 0.06, 6, 0.78),
}


def paint_lesion(
    canvas: Canvas, diagnosis: Diagnosis, skin: Rgb, seed: int, subtlety: float
) -> tuple[npt.NDArray[np.bool_], tuple[str, ...]]:
    """Paint one lesion onto the canvas.

    Args:
        canvas: the photograph; changed in place.
        diagnosis: what to paint.
        skin: the bare skin's colour (3,), 0 to 255.
        seed: decides the lesion's looks, together with `subtlety`.
        subtlety: 0 to 1, how far it has faded into a nondescript patch; continuous.

    Returns:
        The lesion's mask (h, w) and the structures that can be seen, in words.
    """
    if not 0 <= subtlety <= 1:
        raise ValueError(f"a lesion's subtlety lies in 0 to 1, not at {subtlety}")
    kind, rng = _KINDS[diagnosis], np.random.default_rng([seed])
    plainness = kind.faded * subtlety**_FADING
    lesion = _outlined(canvas, rng, kind, plainness)
    lesion.darkening = np.clip(skin / _LIGHT_SKIN, 0.05, 1.0).astype(np.float32)
    bare = canvas.image.copy()
    structures = kind.paint(lesion, rng)
    canvas.multiply(1 + 0.05 * canvas.field(rng, 24, 3) * lesion.body(0.2))
    own, canvas.image = canvas.image, bare.copy()
    _paint_plain(lesion, np.random.default_rng([seed, 2]))
    hidden = _DARK_HIDDEN * subtlety * (1 - float(lesion.darkening.mean()))
    canvas.image = np.asarray(cv2.addWeighted(own, 1 - plainness, canvas.image, plainness, 0), np.float32)
    canvas.image = np.asarray(cv2.addWeighted(canvas.image, 1 - hidden, bare, hidden, 0), np.float32)
    seen = tuple(name for name in structures if plainness < _HIDDEN.get(name, _HIDDEN_OTHERS))
    return lesion.inside > 0, seen
