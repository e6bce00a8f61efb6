"""What lies between the phantom's lesion and the camera: hair, ruler, ink, gel bubbles, vignette."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from derm_pipeline.sources.phantom.canvas import Canvas, Plane, Rgb, curve, rgb, smoothstep

_HAIR_COVERAGE = 0.4
"""A pixel belongs to the hair mask when at least this much of it is covered."""


def draw_hair(canvas: Canvas, skin: Rgb, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw hairs over the image and return their mask (h, w).

    Two habits, as in HAM10000: a few long bent hairs, or many short ones that grow in one direction. Mostly dark; now
    and then fair, on skin light enough for that. `skin` is the bare skin's colour (3,), 0 to 255.
    """
    is_fair = rng.uniform() < 0.12 and float(skin.mean()) > 150
    colour = rgb(138, 98, 58) if is_fair else rgb(36, 27, 24)
    colour = np.asarray(np.minimum(colour * rng.uniform(0.7, 1.25), 0.5 * skin + 60), np.float32)
    is_short = rng.uniform() < 0.35
    count = int(rng.integers(18, 45) if is_short else rng.integers(4, 18))
    thickness = rng.uniform(0.0045, 0.0075)
    direction, spread = rng.uniform(0, math.pi), 0.25 if is_short else 0.6
    ratio = canvas.height_px / canvas.width_px
    strokes = canvas.strokes()
    for _ in range(count):
        middle = rng.uniform(-0.5, 0.5, 2) * np.array([1.0, ratio])
        length = rng.uniform(0.10, 0.22) if is_short else rng.uniform(0.3, 0.95)
        angle, bend = direction + rng.normal(0, spread), rng.normal(0, 0.3 if is_short else 0.9)
        start = middle - 0.5 * length * np.array([math.cos(angle), math.sin(angle)])
        widths = thickness * rng.uniform(0.8, 1.2) * np.linspace(1.1, 0.7, 24)
        strokes.ribbon(curve(start, angle, length, bend, 24), widths, rng.uniform(0.8, 1.0))
    alpha = strokes.alpha()
    canvas.blend(colour, alpha)
    return np.asarray(alpha >= _HAIR_COVERAGE)


def draw_ruler(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw the scale of a dermatoscope: short even ticks across a corner or along an edge, every fifth longer."""
    ratio = canvas.height_px / canvas.width_px
    strokes = canvas.strokes()
    side = int(rng.integers(4))
    corner = rng.uniform() < 0.6
    outward = math.pi / 2 * side + (math.pi / 4 if corner else 0.0) + rng.normal(0, 0.08)
    out = np.array([math.cos(outward), math.sin(outward)])
    along = np.array([-out[1], out[0]])
    half = np.array([0.5, 0.5 * ratio])
    reach = float(np.abs(out) @ half) * (0.82 if corner else 0.88)
    pitch, tick, width = rng.uniform(0.022, 0.032), rng.uniform(0.022, 0.034), rng.uniform(0.004, 0.006)
    middle, first = out * reach, int(rng.integers(5))
    for index in range(-20, 21):
        length = tick * (1.6 if (index + first) % 5 == 0 else 1.0)
        foot = middle + along * pitch * index
        strokes.ribbon(np.stack([foot, foot + out * length * 0.5, foot + out * length]), width)
        if (index + first) % 10 == 0:
            strokes.text(str(10 + index + first), foot - out * 0.03, 0.02)
    if rng.uniform() < 0.25:
        strokes.ribbon(middle + along * np.linspace(-0.7, 0.7, 5)[:, None], width)
    canvas.blend(rgb(22, 20, 22), 0.92 * strokes.alpha())


def draw_ink(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw one or two strokes of a violet surgical marker near the border."""
    ratio = canvas.height_px / canvas.width_px
    strokes = canvas.strokes()
    for _ in range(rng.integers(1, 3)):
        around = rng.uniform(0, 2 * math.pi)
        at = np.array([math.cos(around), ratio * math.sin(around)]) * rng.uniform(0.42, 0.5)
        path = curve(at, around + math.pi / 2 + rng.normal(0, 0.5), rng.uniform(0.15, 0.4), rng.normal(0, 0.8))
        strokes.ribbon(path, rng.uniform(0.018, 0.032))
    patchy = smoothstep(canvas.grain(rng, 70), -1.6, 0.4)
    canvas.blend(rgb(92, 62, 142), 0.75 * canvas.blur(strokes.alpha(), 0.003) * patchy)


def draw_bubbles(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw a cluster of bubbles in the immersion gel: a thin dark rim, a bright crescent, a glint."""
    ratio = canvas.height_px / canvas.width_px
    rims, lights, centre = canvas.strokes(), canvas.strokes(), rng.uniform(-0.45, 0.45, 2) * np.array([1, ratio])
    lamp = rng.uniform(0, 360)
    toward = np.array([math.cos(math.radians(lamp)), math.sin(math.radians(lamp))])
    for _ in range(rng.integers(4, 14)):
        at, radius = centre + rng.normal(0, 0.09, 2), 0.008 + 0.03 * rng.beta(1, 3)
        rims.ring(at, radius, 0.0035, (0, 360))
        lights.ring(at, radius - 0.003, 0.0035, (lamp - 60, lamp + 60))
        lights.spot(at - 0.45 * radius * toward, (0.18 * radius, 0.18 * radius), 0, 1.0)
    canvas.multiply(1 - np.float32(0.35) * rims.alpha())
    canvas.blend(rgb(255, 252, 250), 0.8 * lights.alpha())


def draw_vignette(canvas: Canvas, rng: np.random.Generator) -> Plane:
    """Blacken what lies outside the dermatoscope's round window; returns how visible each pixel stays (h, w)."""
    shift = rng.normal(0, 0.015, 2).astype(np.float32)
    distance = np.sqrt((canvas.x - shift[0]) ** 2 + (canvas.y - shift[1]) ** 2)
    radius, soft = rng.uniform(0.49, 0.57), rng.uniform(0.008, 0.025)
    visible = smoothstep(np.asarray(distance, np.float32), radius + soft, radius - soft)
    canvas.blend(rgb(9, 8, 10), 1 - visible)
    return visible
