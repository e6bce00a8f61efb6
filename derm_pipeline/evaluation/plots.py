"""Charts: dot plots with intervals and loss curves as inline SVG, and the loss curve as pixels.

Horizontal places are per cent of the width and vertical ones pixels, so a chart fits a phone with its text in full
size; colours come from the page's style, so it fits light and dark. The same data give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from derm_pipeline.evaluation.markup import Child, Markup, element, is_known, join, number, percent, points
from derm_pipeline.images import Pixels

Floats = npt.NDArray[np.float64]
Measured = tuple[npt.NDArray[np.integer], npt.NDArray[np.floating]]
"""Steps and the loss after each, (n,)."""

SERIES = {"real": "real", "synthetic": "synthetic", "real+synthetic": "both", "oversampling": "oversampling"}
"""Arm -> the class that gives it a colour (of Okabe and Ito's, safe for colour-blind readers)."""
_SHAPES = {
    "real": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "synthetic": "M0 -5L5 4L-5 4Z",
    "both": "M0 -6L6 0L0 6L-6 0Z",
    "oversampling": "M-4 -4H4V4H-4Z",
    "other": "M-5 -1.5H-1.5V-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5Z",
}
_LANE_PX = 13
_MOST_POINTS = 400
"""Points of a drawn curve; more are not told apart."""


@dataclass(frozen=True)
class Mark:
    """One figure: its value, its interval, whose it is, and the words shown under the pointer."""

    value: float
    low: float | None
    high: float | None
    series: str
    title: str
    is_hollow: bool = False


@dataclass(frozen=True)
class Row:
    """The figures of one line, and a shaded range behind them."""

    label: Child
    note: Child
    marks: Sequence[Mark]
    band: tuple[float, float, float] | None = None
    """low, middle, high."""


@dataclass(frozen=True)
class Scale:
    """What the width stands for."""

    low: float
    high: float
    text: Callable[[float], str] = number
    ticks: Sequence[float] = field(default_factory=tuple)
    origin: float | None = None
    """A value that is drawn as a strong line."""

    def at(self, value: float) -> float:
        """Where a value lies, per cent of the width; what is outside lies on the edge."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)


def share_scale(rows: Sequence[Row]) -> Scale:
    """Up to 100 %, from 0 %, or from 50, 75 or 90 % where nothing in the rows is lower."""
    marks = (mark for row in rows for mark in row.marks)
    least = min((mark.value if mark.low is None else min(mark.low, mark.value) for mark in marks), default=0.0)
    start = max(edge for edge in (0, 0.5, 0.75, 0.9) if edge <= max(0.0, least))
    ticks = tuple(start + (1 - start) * part for part in (0, 0.25, 0.5, 0.75, 1))
    return Scale(start, 1, lambda value: percent(value).replace(".0", ""), ticks)


def gain_scale(values: Sequence[Any]) -> Scale:
    """As far to both sides of zero as the values reach, in points."""
    most = max((abs(float(value)) for value in values if is_known(value)), default=0.1)
    reach = nice(max(most, 0.01))
    return Scale(
        -reach,
        reach,
        _whole_points,
        (-reach, -reach / 2, 0, reach / 2, reach),
        0.0,
    )


def _whole_points(gain: float) -> str:
    return points(gain).removesuffix(".0") if gain else "0"


def from_zero_scale(values: Sequence[Any]) -> Scale:
    """From 0, or the least value where that is negative, to the greatest."""
    known = [float(value) for value in values if is_known(value)]
    most, least = max(known, default=1.0), min(0.0, min(known, default=0.0))
    high = nice(max(most, -least, 1e-9))
    return Scale(least * 1.05, high, number, tuple(high * part for part in (0, 0.25, 0.5, 0.75, 1)))


def nice(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten that is at least `value`, which is positive."""
    power = 10.0 ** math.floor(math.log10(value))
    step = next(step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))
    return float(step * power)


def dot_plot(rows: Sequence[Row], scale: Scale, *, label: str) -> Markup:
    """A line a row: label, marks with intervals on the common scale, note."""
    lines = []
    for row in rows:
        lanes = max(1, len(row.marks))
        height = _LANE_PX * lanes + 9
        inner = [_grid(scale, height), _band(row, scale, height)]
        inner += [_mark(mark, scale, 4.5 + _LANE_PX * (lane + 0.5)) for lane, mark in enumerate(row.marks)]
        drawing = element("svg", inner, width="100%", height=height, class_="track", role="img", aria_label=label)
        lines.append(
            element(
                "div",
                element("div", row.label, class_="label"),
                element("div", drawing, class_="plot"),
                element("div", row.note, class_="rownote"),
                class_="row",
            )
        )
    axis = element("svg", _tick_texts(scale), width="100%", height=18, class_="track", aria_hidden="true")
    start = f"the axis begins at {scale.text(scale.low)}" if scale.low > 0 else None
    foot = element(
        "div",
        element("div", class_="label"),
        element("div", axis, class_="plot"),
        element("div", start, class_="rownote"),
        class_="row axis",
    )
    return element("div", lines, foot, class_="dots")


def _tick_texts(scale: Scale) -> Iterator[Markup]:
    for tick in scale.ticks:
        yield element("text", scale.text(tick), x=f"{scale.at(tick)}%", y=13, class_="tick", text_anchor="middle")


def _grid(scale: Scale, height: float) -> Iterator[Markup]:
    for tick in scale.ticks:
        x = f"{scale.at(tick)}%"
        kind = "origin" if tick == scale.origin else "grid"
        yield element("line", x1=x, x2=x, y1=0, y2=height, class_=kind)


def _band(row: Row, scale: Scale, height: float) -> Markup:
    if row.band is None:
        return Markup("")
    low, middle, high = map(scale.at, row.band)
    box = element("rect", x=f"{low}%", width=f"{max(0.4, high - low):.2f}%", y=2, height=height - 4, class_="floor")
    line = element("line", x1=f"{middle}%", x2=f"{middle}%", y1=2, y2=height - 2, class_="floorline")
    return join([box, line])


def _mark(mark: Mark, scale: Scale, y: float) -> Markup:
    series = SERIES.get(mark.series, "other")
    whisker = None
    if mark.low is not None and mark.high is not None:
        low, high = scale.at(mark.low), scale.at(mark.high)
        whisker = element("line", x1=f"{low}%", x2=f"{high}%", y1=y, y2=y, class_="whisker")
    shape = element("path", d=_SHAPES[series], class_="hollow" if mark.is_hollow else "solid")
    # A nested drawing is the way to put a shape of fixed size at a place in per cent.
    placed = element("svg", shape, x=f"{scale.at(mark.value)}%", y=y, overflow="visible", width=1, height=1)
    return element("g", element("title", mark.title), whisker, placed, class_=f"s-{series}")


def legend(arms: Sequence[str]) -> Markup:
    """Which colour and shape is which arm."""
    items = []
    for arm in arms:
        series = SERIES.get(arm, "other")
        shape = element("path", d=_SHAPES[series], class_="solid")
        drawing = element("svg", shape, viewBox="-7 -7 14 14", width=14, height=14, aria_hidden="true")
        items.append(element("span", drawing, arm, class_=f"key s-{series}"))
    return element("div", items, class_="legend")


# --- Loss curves --------------------------------------------------------------------------------------------------


def smoothed(losses: Floats) -> Floats:
    """The centred mean over a fortieth of the steps; over fewer at the ends."""
    half = len(losses) // 80
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    index = np.arange(len(losses))
    low, high = np.maximum(0, index - half), np.minimum(len(losses), index + half + 1)
    return (sums[high] - sums[low]) / (high - low)


def wants_log(losses: Floats, validation: Floats | None = None) -> bool:
    """Whether the smoothed loss spans so much that only logarithms show its end, and all can be drawn so."""
    curve = smoothed(losses)
    is_positive = losses.min() > 0 and (validation is None or bool((validation > 0).all()))
    return bool(is_positive and curve.max() > 6 * curve.min())


def loss_chart(
    steps: npt.NDArray[np.integer], losses: Floats, *, label: str, validation: Measured | None = None
) -> Markup:
    """The smoothed loss over the range of the raw one, and that on val images beside it; all (n,) and finite."""
    losses = np.asarray(losses, np.float64)
    measured_steps, measured = validation if validation is not None else (steps[:0], losses[:0])
    exact = np.asarray(measured, np.float64)
    log = wants_log(losses, exact)
    to_y: Callable[[Floats], Floats] = np.log10 if log else np.asarray
    curve, raw, beside = to_y(smoothed(losses)), to_y(losses), to_y(exact)
    low, high = _limits(np.concatenate([curve, beside]), raw)

    def place(values: Floats) -> Floats:
        return 100 * (1 - np.clip((values - low) / (high - low), 0, 1))

    groups = np.array_split(np.arange(len(losses)), min(len(losses), _MOST_POINTS))
    first, span = float(steps[0]), max(1.0, float(steps[-1] - steps[0]))

    def across(at: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> Floats:
        return np.clip(100 * (at - first) / span, 0, 100)

    x = across(np.array([steps[group].mean() for group in groups]))
    upper = place(np.array([raw[group].max() for group in groups]))
    lower = place(np.array([raw[group].min() for group in groups]))
    middle = place(np.array([curve[group].mean() for group in groups]))
    outline = _path(np.concatenate([x, x[::-1]]), np.concatenate([upper, lower[::-1]])) + "Z"
    ticks = _loss_ticks(low, high, log=log)
    places = [round(float(place(to_y(np.array([tick])))[0]), 2) for tick in ticks]
    grid = (element("line", x1=0, x2=100, y1=y, y2=y, class_="grid") for y in places)
    drawing = element(
        "svg",
        grid,
        element("path", d=outline, class_="raw"),
        element("path", d=_path(x, middle), class_="curve"),
        _measured_path(across(measured_steps), place(beside)),
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        width="100%",
        height=200,
        role="img",
        aria_label=label,
    )
    texts = (
        element("text", number(tick), x="92%", y=f"{y}%", dy="0.32em", text_anchor="end", class_="tick")
        for tick, y in zip(ticks, places, strict=True)
    )
    side = element("svg", texts, width="100%", height=200, class_="track", aria_hidden="true")
    foot = element("div", element("span", f"step {steps[0]:,}"), element("span", f"{steps[-1]:,}"), class_="steps")
    words = f"{label}, logarithmic" if log else label
    return element(
        "figure", element("figcaption", words), element("div", side, drawing, class_="chart"), foot, class_="loss"
    )


def _measured_path(x: Floats, y: Floats) -> Markup | None:
    """A line with a dot at every measurement; a dot is a line of no length with round ends, in a stretched drawing."""
    if not len(x):
        return None
    dots = "".join(f"M{a:.2f} {b:.2f}h0" for a, b in zip(x, y, strict=True))
    line = element("path", d=_path(x, y), class_="curve s-synthetic")
    return join([line, element("path", d=dots, class_="curve dot s-synthetic")])


def _limits(curve: Floats, raw: Floats) -> tuple[float, float]:
    # Single steps may be far out; the curve must always fit.
    low, high = np.quantile(raw, (0.005, 0.995))
    low, high = min(low, curve.min()), max(high, curve.max())
    margin = 0.04 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _path(x: Floats, y: Floats) -> str:
    return "M" + "L".join(f"{a:.2f} {b:.2f}" for a, b in zip(x, y, strict=True))


def _loss_ticks(low: float, high: float, *, log: bool) -> list[float]:
    if log:
        powers = range(math.floor(low), math.ceil(high) + 1)
        ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
        return inside if len(inside) <= 7 else [tick for tick in inside if math.log10(tick).is_integer()]
    step = nice((high - low) / 5)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def loss_curve_picture(
    steps: npt.NDArray[np.integer],
    losses: npt.NDArray[np.floating],
    title: str,
    *,
    validation: Measured | None = None,
    width_px: int = 640,
) -> Pixels:
    """The loss curve as an image (width_px / 2, width_px, 3) uint8, for places that show pictures only.

    Losses on val images, where some are given, are a line with dots.

    Raises:
        ValueError: steps and losses (n,) that are empty or of different lengths.
    """
    if not len(steps) or len(steps) != len(losses):
        raise ValueError(f"{len(steps)} steps and {len(losses)} losses; give as many of both, at least one")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    exact = np.asarray(losses, np.float64)
    figure = Figure(figsize=(width_px / 100, width_px / 200), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, exact, color="#0072B2", alpha=0.25, linewidth=0.7)
    axes.plot(steps, smoothed(exact), color="#0072B2", linewidth=1.8)
    words = f"{title}: loss, smoothed over the raw one"
    measured = np.zeros(0) if validation is None else np.asarray(validation[1], np.float64)
    if validation is not None and len(measured):
        axes.plot(validation[0], measured, color="#D55E00", linewidth=1.4, marker="o", markersize=3.5)
        words += "; with dots on val images"
    if wants_log(exact, measured):
        axes.set_yscale("log")
    axes.set_title(words, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
