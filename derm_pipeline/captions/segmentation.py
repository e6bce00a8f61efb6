"""Where the skin and the lesion are in one picture: unsupervised, at a small fixed scale, in milliseconds.

Colour alone finds every freckle and shadow, place alone finds a disc. Two Gaussians in colour and one in place, fitted
together by expectation-maximisation, find the blob near the centre whose colour differs from the skin around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from derm_pipeline.images import Pixels

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

WORK_PX = 192
"""Long side of the picture that everything is measured on."""
_FIT_STEP = 3
"""The mixture is fitted on every third pixel each way: long side 64."""
_FIT_ROUNDS = 10
_COLOUR_NOISE = 4.0
"""Variance added to each Lab channel, in Lab units squared: what sensor and compression do to one colour."""
_PLACE_NOISE = 0.001
"""Variance added to the place, in picture widths squared."""
_POSTERIOR = 0.1
"""A pixel above this probability is lesion: people draw the outline outside the half-way contour."""
_SMOOTH_PX = 1.5
"""Spread of the Gaussian that the probability is smoothed with first."""
_SPUR_PX = 3
_CENTRE_SPREADS = (0.3, 0.03)
"""The fit starts from a wide and from a narrow neighbourhood of the centre: from a wide one alone, a small lesion on
unevenly lit skin ends as the lamp's bright spot."""
_GLARE_WEIGHT = 0.3
"""What is lighter than its surroundings and hardly redder is a lesion only where nothing else is."""
_LEAST_STEP = 0.2
"""Step in colour, in Lab units, below which there is no outline at all; whether a lesion is worth a word is decided
from its contrast later."""
_SHARES = (0.03, 0.7)
"""The prior share of lesion stays within these: a picture has both lesion and skin."""


@dataclass(frozen=True)
class Scene:
    """One picture at working scale with its parts; all arrays share (h, w), the long side being `WORK_PX`."""

    rgb: Pixels
    """The picture as it is, (h, w, 3)."""
    lab: Floats
    """CIE L*a*b* (L 0 to 100) of the picture without hairs, (h, w, 3)."""
    field: Mask
    """What the instrument sees: not the dark corners."""
    hair: Mask
    """Hairs: those given, else long thin dark lines."""
    lesion: Mask
    """The lesion: one filled component, or empty when nothing stands out."""

    @property
    def skin(self) -> Mask:
        """Field outside the lesion's neighbourhood and the hairs; never empty."""
        margin = max(3, round(0.2 * float(np.sqrt(self.lesion.sum() / np.pi))))
        near = cv2.dilate(self.lesion.astype(np.uint8), disc(margin)).astype(bool)
        for skin in (self.field & ~near & ~self.hair, self.field & ~self.lesion):
            if skin.mean() > 0.01:
                return skin
        return np.ones_like(self.field)


def see(image: Pixels, hair: Mask | None = None) -> Scene:
    """Find the parts of one RGB image (h, w, 3) of any size; `hair` is its mask (any size, same aspect), if known.

    Raises:
        ValueError: not an RGB image.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"an image must be uint8 RGB (h, w, 3), not {image.dtype} {image.shape}")
    rgb = _at_working_scale(image)
    height, width = rgb.shape[:2]
    dark_details = _dark_details(rgb)
    if hair is None:
        hair_mask = long_lines(dark_details)
    else:
        coverage = cv2.resize(hair.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        hair_mask = coverage > 0.2
    clean = _without_dark_details(rgb, (dark_details > _DETAIL_CONTRAST) | hair_mask)
    lab = to_lab(clean)
    field = _field(lab[..., 0])
    lesion = _lesion(lab, field)
    if hair is None:
        hair_mask = _crossing_skin(hair_mask, lesion)
    return Scene(rgb=rgb, lab=lab, field=field, hair=hair_mask, lesion=lesion)


_DETAIL_CONTRAST = 12
"""Grey levels by which a hair or dot is darker than what is around it."""


def _at_working_scale(image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    scale = WORK_PX / max(height, width)
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), dtype=np.uint8)


def to_lab(rgb: Pixels) -> Floats:
    """CIE L*a*b* under D65 of RGB pixels: L 0 to 100."""
    return np.asarray(cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), dtype=np.float32)


def disc(radius: int) -> npt.NDArray[np.uint8]:
    """A filled disc as structuring element, (2 radius + 1, 2 radius + 1)."""
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)), dtype=np.uint8)


def _dark_details(rgb: Pixels) -> npt.NDArray[np.uint8]:
    """How much darker each pixel is than the closing around it (black-hat), grey levels."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, disc(3)), dtype=np.uint8)


def _without_dark_details(rgb: Pixels, details: Mask) -> Pixels:
    clean = np.where(details[..., None], cv2.morphologyEx(rgb, cv2.MORPH_CLOSE, disc(3)), rgb)
    return np.asarray(cv2.medianBlur(clean, 5), dtype=np.uint8)


def long_lines(dark_details: npt.NDArray[np.uint8], *, length_px: int = 28) -> Mask:
    """Dark lines at least `length_px` long and much longer than wide: hairs, neither dots nor a ruler's ticks."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((dark_details > _DETAIL_CONTRAST).astype(np.uint8))
    _, _, width, height, area = stats.T
    length = np.hypot(width, height)
    # One hair is thin; hairs that cross leave most of their box empty, which a pigment network does not.
    is_line = (length >= length_px) & ((area < 4 * length) | (area < 0.2 * width * height))
    is_line[0] = False
    return np.asarray(is_line[labels], dtype=np.bool_)


def _crossing_skin(lines: Mask, lesion: Mask) -> Mask:
    """The lines that lie at least half on skin: hairs cross it, vessels and fissures stay in the lesion."""
    count, labels = cv2.connectedComponents(lines.astype(np.uint8))
    near = cv2.dilate(lesion.astype(np.uint8), disc(3)).astype(bool)
    size, within = np.bincount(labels.ravel(), minlength=count), np.bincount(labels[near], minlength=count)
    is_hair = within < 0.5 * size
    is_hair[0] = False
    return np.asarray(is_hair[labels], dtype=np.bool_)


def _field(lightness: Floats) -> Mask:
    """Everything but the dark regions that hold a corner of the picture."""
    dark = lightness < min(30.0, 0.45 * float(np.quantile(lightness, 0.7)))
    _, labels = cv2.connectedComponents(dark.astype(np.uint8), connectivity=4)
    corners = [label for label in (labels[0, 0], labels[0, -1], labels[-1, 0], labels[-1, -1]) if label]
    outside = np.isin(labels, corners)
    if outside.any():
        outside = cv2.dilate(outside.astype(np.uint8), disc(4)).astype(bool)
    return ~outside if outside.mean() < 0.8 else np.ones_like(outside)


def _lesion(lab: Floats, field: Mask) -> Mask:
    """The candidate that stands out most: step in colour across its outline times the root of its area."""
    best, most = np.zeros_like(field), 0.0
    for posterior in _posteriors(lab, field):
        blob = _blob(posterior, field)
        step = _step(lab, field, blob)
        if step > _LEAST_STEP and step * np.sqrt(blob.sum()) > most:
            best, most = blob, step * float(np.sqrt(blob.sum()))
    return best


def _step(lab: Floats, field: Mask, blob: Mask) -> float:
    """Distance in Lab (CIE76) between the median colours just inside and just outside; less for a lamp's spot."""
    plane = blob.astype(np.uint8)
    inner = blob & ~cv2.erode(plane, disc(5)).astype(bool)
    outer = cv2.dilate(plane, disc(5)).astype(bool) & ~blob & field
    if not inner.any() or not outer.any():
        return 0.0
    lightness, a, b = (np.median(lab[inner], axis=0) - np.median(lab[outer], axis=0)).tolist()
    is_glare = lightness > max(2.0, a)
    return float(np.sqrt(lightness**2 + a**2 + b**2)) * (_GLARE_WEIGHT if is_glare else 1.0)


def _blob(posterior: Floats, field: Mask) -> Mask:
    """The component of high posterior that is large and central, filled."""
    blob = (cv2.GaussianBlur(posterior, (0, 0), _SMOOTH_PX) > _POSTERIOR).astype(np.uint8)
    # Hairs and furrows leave spurs; a lesion is wider than they are.
    blob = np.asarray(cv2.morphologyEx(blob, cv2.MORPH_OPEN, disc(_SPUR_PX)), dtype=np.uint8)
    count, labels, stats, centres = cv2.connectedComponentsWithStats(blob)
    if count < 2:
        return np.zeros_like(field)
    height, width = field.shape
    offset = (centres[1:] - (width / 2, height / 2)) / width
    weight = stats[1:, cv2.CC_STAT_AREA] * np.exp(-(offset**2).sum(axis=1) / 0.05)
    chosen = (labels == 1 + int(weight.argmax())).astype(np.uint8)
    outline, _ = cv2.findContours(chosen, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.zeros_like(chosen), outline, -1, 1, cv2.FILLED), dtype=np.bool_)


def _posteriors(lab: Floats, field: Mask) -> list[Floats]:
    """Probability of lesion for each pixel, (h, w) in [0, 1], 0 outside the field; one for each start.

    Expectation-maximisation (Dempster, Laird and Rubin 1977) of two classes: lesion, Gaussian in Lab and in place;
    skin, Gaussian in Lab and anywhere. It starts from the distance to the colour of the picture's rim, near the centre.
    """
    height, width = field.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    place = np.stack([columns / width - 0.5, (rows - height / 2) / width], axis=-1)
    coarse = np.s_[::_FIT_STEP, ::_FIT_STEP]
    inside = field[coarse] if field[coarse].any() else np.ones_like(field[coarse])
    colours, places = lab[coarse][inside], place[coarse][inside]
    radius = (2 * places[:, 0]) ** 2 + (2 * width / height * places[:, 1]) ** 2
    rim = np.median(colours[radius >= min(0.85, float(np.median(radius)))], axis=0)
    distance = np.linalg.norm(colours - rim, axis=1)
    distance /= max(float(np.quantile(distance, 0.95)), 1.0)
    terms = _quadratic_terms(colours - rim, places)
    total = terms.sum(axis=1, dtype=np.float64)
    everywhere = _quadratic_terms((lab - rim).reshape(-1, 3), place.reshape(-1, 2))
    posteriors = []
    for spread in _CENTRE_SPREADS:
        share = np.clip(np.exp(-0.5 * radius / spread) * distance, 0, 1)
        weights = np.zeros(len(terms))
        for _ in range(_FIT_ROUNDS):
            weights = _log_odds_weights(terms @ share, total, area=height / width)
            share = _sigmoid(weights.astype(np.float32) @ terms)
        posterior = _sigmoid(weights.astype(np.float32) @ everywhere).reshape(field.shape)
        posteriors.append(np.where(field, posterior, 0).astype(np.float32))
    return posteriors


def _quadratic_terms(colours: Floats, places: Floats) -> Floats:
    """The terms in which a Gaussian's log density is linear, (15, n): 1, nine of colour, five of place."""
    light, a, b = colours.T
    x, y = places.T
    colour_terms = [light, a, b, light * light, light * a, light * b, a * a, a * b, b * b]
    return np.stack([np.ones_like(x), *colour_terms, x, y, x * x, x * y, y * y])


def _log_odds_weights(lesion_sums: Floats, total: npt.NDArray[np.float64], *, area: float) -> npt.NDArray[np.float64]:
    """Weights of the quadratic terms in log(lesion / skin) after one maximisation step, (15,).

    Args:
        lesion_sums: Sum of each term over the pixels, weighted with their share of lesion, (15,).
        total: The same sum without weights, (15,).
        area: Of the picture, in squared picture widths.
    """
    lesion = lesion_sums.astype(np.float64) + 1e-6 * total
    skin = total - (1 - 1e-6) * lesion
    prior = float(np.clip(lesion[0] / (lesion[0] + skin[0]), *_SHARES))
    weights = np.zeros(15)
    # Skin lies anywhere: its density in place is 1 / area.
    weights[0] = np.log(prior / (1 - prior)) + np.log(area)
    for moments, sign in ((lesion / lesion[0], 1), (skin / skin[0], -1)):
        weights[:10] += sign * _gaussian_weights(moments[1:4], moments[4:10], _COLOUR_NOISE)
    place = _gaussian_weights(lesion[10:12] / lesion[0], lesion[12:15] / lesion[0], _PLACE_NOISE)
    weights[0] += place[0]
    weights[10:] += place[1:]
    return weights


_UPPER = {size: np.triu_indices(size) for size in (2, 3)}


def _gaussian_weights(
    mean: npt.NDArray[np.float64], products: npt.NDArray[np.float64], noise: float
) -> npt.NDArray[np.float64]:
    """Weights of 1, each value and each product of two values in a Gaussian's log density.

    Args:
        mean: First moments, (d,).
        products: Second moments E[x_i x_j] for i <= j, row by row, (d (d + 1) / 2,).
        noise: Variance added to each value.
    """
    upper = _UPPER[len(mean)]
    second = np.zeros((len(mean), len(mean)))
    second[upper] = second.T[upper] = products
    covariance = second - np.outer(mean, mean) + noise * np.eye(len(mean))
    precision = np.linalg.inv(covariance)
    constant = -0.5 * (mean @ precision @ mean + np.linalg.slogdet(2 * np.pi * covariance)[1])
    twice = np.where(upper[0] == upper[1], -0.5, -1.0) * precision[upper]
    return np.concatenate([[constant], precision @ mean, twice])


def _sigmoid(log_odds: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    return 1 / (1 + np.exp(-np.clip(log_odds, -30, 30)))
