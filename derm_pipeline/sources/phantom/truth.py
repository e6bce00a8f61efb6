"""What is to be seen on a phantom, by the plainest definitions and before anything disturbs the view.

The words' definitions are those of the captions; nothing else is shared with what measures photographs. Colours are
read off the painting itself: no light, no hair, no artefact, no compression.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from derm_pipeline.sources.phantom.canvas import Plane, Rgb

Mask = npt.NDArray[np.bool_]

COLOURS = ("white", "pink", "red", "light brown", "dark brown", "blue-grey", "black")
"""The dermoscopic palette (six colours of the ABCD rule, Stolz et al. 1994, and pink)."""

TRUTHS = (
    *("lesion_fraction", "cut_off_fraction", "asymmetry", "border_irregularity"),
    *(colour.replace(" ", "_").replace("-", "_") for colour in COLOURS),
)
"""Names of the facts as concepts of a record."""

_PALETTE: dict[str, tuple[tuple[int, int, int], ...]] = {
    "pink": ((238, 172, 170), (226, 142, 140), (236, 198, 206)),
    "red": ((208, 96, 88), (186, 42, 54), (158, 76, 72), (150, 22, 40), (98, 18, 52)),
    "light brown": ((206, 156, 112), (184, 130, 90), (158, 108, 74)),
    "dark brown": ((116, 74, 50), (86, 52, 38), (58, 34, 26)),
    "blue-grey": ((132, 140, 166), (98, 104, 126), (64, 68, 88)),
    "black": ((30, 22, 22), (14, 10, 10)),
}
"""What each word looks like on a screen, in sRGB: a painted pixel has the word of the nearest one in CIELAB (CIE76).
White has no entry: a white area is one whiter than the skin around it."""
_SKIN_DISTANCE = 8.0
"""CIE76 distance from the bare skin below which a pixel has the skin's colour."""
_VISIBLE = 0.05
"""Part of the bare skin's brightness, in any channel, by which paint must change it to be seen: the lesion reaches as
far as that. People outline lesions outside the half-way contour (the lesion's mask) too."""
_NOTCH = 0.01
"""Spread of the Gaussian, in image widths, that smooths the outline first: nobody follows finer notches."""
_WHITER = 5.0
"""White is lighter than the bare skin by this, in L*, and less colourful."""


@dataclass(frozen=True)
class PhantomTruth:
    """Measurable facts of one phantom; named as the captioner names its measurements."""

    lesion_fraction: float
    """Area of the lesion in view over the area in view, 0 to 1."""
    cut_off_fraction: float
    """Part of the lesion's outline that lies on the edge of the view, 0 to 1."""
    asymmetry: float
    """Part of the lesion that its mirror image misses, for the worse of its two principal axes, 0 to 1."""
    border_irregularity: float
    """Part of the convex hull that is not lesion, 0 to 1."""
    colours: tuple[float, ...]
    """Share of the lesion that was painted in each of `COLOURS`; the rest has the skin's colour."""

    def concepts(self) -> dict[str, str]:
        """The facts in words of a table, by `TRUTHS`."""
        values = (self.lesion_fraction, self.cut_off_fraction, self.asymmetry, self.border_irregularity, *self.colours)
        return {name: f"{value:.4f}" for name, value in zip(TRUTHS, values, strict=True)}


def truth_of(
    painting: npt.NDArray[np.float32], bare: npt.NDArray[np.float32], skin: Rgb, lesion: Mask, view: Mask
) -> PhantomTruth:
    """The facts of one painting.

    Args:
        painting: RGB (h, w, 3), 0 to 255, of skin and lesion alone.
        bare: the same (h, w, 3) before the lesion was painted.
        skin: the bare skin's mean colour (3,), 0 to 255.
        lesion: (h, w), where the lesion's paint covers at least half; one pixel or more.
        view: (h, w), what the instrument sees.
    """
    visible = lesion | (np.abs(painting - bare) > _VISIBLE * bare).any(axis=2)
    seen = visible & view
    shape = _smoothed(visible)
    return PhantomTruth(
        lesion_fraction=float(seen.sum() / view.sum()),
        cut_off_fraction=_cut_off_fraction(seen, view),
        asymmetry=_asymmetry(shape),
        border_irregularity=_border_irregularity(shape),
        colours=_colour_shares(painting[lesion], skin),
    )


def _smoothed(lesion: Mask) -> Mask:
    spread = max(0.3, _NOTCH * lesion.shape[1])
    smooth = cv2.GaussianBlur(lesion.astype(np.float32), (0, 0), spread, borderType=cv2.BORDER_CONSTANT) >= 0.5
    return np.asarray(smooth, np.bool_) if smooth.any() else lesion


def _cut_off_fraction(lesion: Mask, view: Mask) -> float:
    """Outline pixels are those with a neighbour outside the lesion; the edge of the view is such a neighbour too."""
    outline = lesion & ~_core(lesion)
    return float((outline & ~_core(view)).sum() / max(1, outline.sum()))


def _core(mask: Mask) -> Mask:
    """Pixels whose eight neighbours are all inside; nothing is inside beyond the picture."""
    height, width = mask.shape
    wide = np.zeros((height + 2, width + 2), bool)
    wide[1:-1, 1:-1] = mask
    core = mask.copy()
    for row in range(3):
        for column in range(3):
            core &= wide[row : row + height, column : column + width]
    return core


def _asymmetry(lesion: Mask) -> float:
    """Reflect every pixel's centre about each principal axis and count those that land outside."""
    rows, columns = np.nonzero(lesion)
    places = np.stack([columns, rows], axis=1).astype(np.float64)
    centre = places.mean(axis=0)
    _, axes = np.linalg.eigh((places - centre).T @ (places - centre))
    missed = []
    for axis in axes.T:
        along = (places - centre) @ axis
        mirrored = np.rint(centre + 2 * along[:, None] * axis - (places - centre)).astype(np.intp)
        inside = ((mirrored >= 0) & (mirrored < lesion.shape[::-1])).all(axis=1)
        hit = lesion[mirrored[inside, 1], mirrored[inside, 0]]
        missed.append(1 - hit.sum() / len(places))
    return float(max(missed))


def _border_irregularity(lesion: Mask) -> float:
    """Count the pixels inside the convex hull that are not lesion."""
    rows = np.flatnonzero(lesion.any(axis=1))
    ends = [lesion[rows].argmax(axis=1), lesion.shape[1] - 1 - lesion[rows, ::-1].argmax(axis=1)]
    corners = np.concatenate([np.stack([columns, rows], axis=1) for columns in ends]).astype(np.int32)
    hull = cv2.fillConvexPoly(np.zeros(lesion.shape, np.uint8), cv2.convexHull(corners), 1)
    return float((hull.astype(bool) & ~lesion).sum() / hull.sum())


def _colour_shares(painted: npt.NDArray[np.float32], skin: Rgb) -> tuple[float, ...]:
    """Shares (7,) of the painted pixels (n, 3) with each of `COLOURS`."""
    words = [word for word, examples in _PALETTE.items() for _ in examples]
    examples = np.array([example for examples in _PALETTE.values() for example in examples], np.float32)
    lab, palette, bare = _lab(np.clip(painted, 0, 255)), _lab(examples), _lab(skin[None])[0]
    apart = (palette**2).sum(axis=1) - 2 * lab @ palette.T  # the squared distance less what all entries share
    nearest = np.array([COLOURS.index(word) for word in words])[apart.argmin(axis=1)]
    is_white = (lab[:, 0] > bare[0] + _WHITER) & (np.hypot(lab[:, 1], lab[:, 2]) < np.hypot(bare[1], bare[2]))
    nearest[is_white] = COLOURS.index("white")
    nearest[((lab - bare) ** 2).sum(axis=1) < _SKIN_DISTANCE**2] = -1
    return tuple(float((nearest == index).mean()) for index in range(len(COLOURS)))


def _lab(rgb: npt.NDArray[np.float32]) -> Plane:
    """CIE L*a*b* under D65 of (n, 3) colours, 0 to 255."""
    return np.asarray(cv2.cvtColor(rgb[None] * np.float32(1 / 255), cv2.COLOR_RGB2LAB)[0], np.float32)
