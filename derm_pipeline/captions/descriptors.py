"""What can be measured in one picture of a lesion: shape, colours by name, structures, skin tone, artefacts.

Numbers only: which of them deserve a word is decided in `visual`. All are unitless or in degrees, so that they do not
depend on the picture's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from derm_pipeline.captions.segmentation import Floats, Mask, Scene, disc, to_lab
from derm_pipeline.records import SkinType
from derm_pipeline.sources.statistics import ItaClass, ita_class, ita_degrees

Colour = Literal["white", "pink", "red", "light brown", "dark brown", "blue-grey", "black"]
COLOURS: tuple[Colour, ...] = ("white", "pink", "red", "light brown", "dark brown", "blue-grey", "black")
"""The dermoscopic palette (six colours of the ABCD rule, Stolz et al. 1994, and pink)."""

_REFERENCE_AB = (11.0, 16.0)
"""CIELAB a* and b* of skin under a neutral light, nearly the same for all skin types."""
_CAST_SHARE = 0.6
"""Part of the skin's deviation from that hue which counts as the light's cast; the rest is flushed or sallow skin."""


@dataclass(frozen=True)
class Measurements:
    """What was measured in one picture; the lesion's part is 0 where no lesion was found."""

    has_lesion: bool
    """Whether something stands out from the skin."""
    lesion_fraction: float
    """Area of the lesion over the area that the instrument sees, 0 to 1."""
    cut_off_fraction: float
    """Part of the lesion's outline that lies on the edge of the view, 0 to 1."""
    contrast: float
    """Distance in Lab (CIE76) between the median colours of lesion and skin."""
    asymmetry: float
    """Part of the lesion that its mirror image misses, for the worse of its two principal axes, 0 to 1."""
    colour_asymmetry: float
    """Mean Lab distance between mirrored halves, for the worse axis."""
    border_irregularity: float
    """Part of the convex hull that is not lesion, 0 to 1."""
    compactness: float
    """Perimeter squared over 4 pi area: 1 for a disc."""
    border_sharpness: float
    """Step in lightness and colour across the border over the whole contrast: near 1 is sharp, near 0 fades."""
    white: float
    """Fraction of the lesion that is white, as are the next six."""
    pink: float
    """See `white`."""
    red: float
    """See `white`."""
    light_brown: float
    """See `white`."""
    dark_brown: float
    """See `white`."""
    blue_grey: float
    """See `white`."""
    black: float
    """See `white`."""
    centre_lightness: float
    """Lightness L* of the inner third minus that of the outer third."""
    network_fraction: float
    """Fraction of the lesion covered by a dark mesh that encloses holes."""
    num_mesh_holes: int
    """Number of holes in that mesh."""
    mesh_density: float
    """Number of those holes in a thousandth of a square picture width, on average over the lesion."""
    num_dark_dots: int
    """Number of small dark round spots in the lesion."""
    num_bright_spots: int
    """Number of small bright round spots in the lesion."""
    num_red_blobs: int
    """Number of rounded red areas in the lesion, each darker or redder than what is around it."""
    ita_deg: float
    """Individual typology angle of the skin without the light's cast, degrees."""
    hair_fraction: float
    """Fraction of the view covered by hair."""
    dark_corner_fraction: float
    """Fraction of the picture that the instrument does not see."""

    def colour_fraction(self, colour: Colour) -> float:
        """Fraction of the lesion with this colour, 0 to 1."""
        return float(getattr(self, colour.replace(" ", "_").replace("-", "_")))

    @property
    def ita_class(self) -> ItaClass:
        """The name of the angle's class."""
        return ita_class(self.ita_deg)[0]

    @property
    def skin_type(self) -> SkinType:
        """The Fitzpatrick type estimated from the skin's colour."""
        return ita_class(self.ita_deg)[1]


def measure(scene: Scene) -> Measurements:
    """Measure everything in one picture."""
    skin_lab = np.median(scene.lab[scene.skin], axis=0)
    seen = float(scene.field.sum())
    picture: dict[str, Any] = {
        "ita_deg": _ita_without_cast(skin_lab),
        "hair_fraction": float((scene.hair & scene.field).sum()) / seen,
        "dark_corner_fraction": 1 - float(scene.field.mean()),
        "lesion_fraction": float(scene.lesion.sum()) / seen,
    }
    if scene.lesion.sum() < _MIN_LESION_PX:
        return Measurements(has_lesion=False, **(_NO_LESION | picture))
    raw = to_lab(np.asarray(cv2.medianBlur(scene.rgb, 3), dtype=np.uint8))
    contrast = float(np.linalg.norm(np.median(scene.lab[scene.lesion], axis=0) - skin_lab))
    names = _colour_names(raw, skin_lab)
    lesion: dict[str, Any] = {
        "contrast": contrast,
        "cut_off_fraction": _cut_off(scene),
        **_symmetry(scene),
        **_border(scene, contrast),
        **_colour_fractions(names, scene),
        "centre_lightness": _centre_lightness(scene),
        **_structures(scene, raw),
    }
    return Measurements(has_lesion=contrast >= _MIN_CONTRAST, **(picture | lesion))


def _ita_without_cast(skin_lab: npt.NDArray[np.floating]) -> float:
    """The typology angle of the skin as it would look under a neutral light.

    Under a pink or blue light b* is near 0 and the angle near 90 degrees, whatever the skin; so b* is moved towards
    that of skin in general by the share of the cast.
    """
    b = float(skin_lab[2]) + _CAST_SHARE * (_REFERENCE_AB[1] - float(skin_lab[2]))
    return ita_degrees(float(skin_lab[0]), b)


_MIN_LESION_PX = 40
_MIN_CONTRAST = 4.0
"""Lab distance below which a lesion cannot be told from uneven skin."""
_NO_LESION: dict[str, Any] = {
    name: 0 if name.startswith("num_") else 0.0 for name in Measurements.__dataclass_fields__ if name != "has_lesion"
}


def _cut_off(scene: Scene) -> float:
    inner = cv2.erode(scene.field.astype(np.uint8), disc(1), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    outline = scene.lesion & ~cv2.erode(
        scene.lesion.astype(np.uint8), disc(1), borderType=cv2.BORDER_CONSTANT, borderValue=0
    ).astype(bool)
    return float((outline & ~inner.astype(bool)).sum()) / max(1, int(outline.sum()))


_SPOT_CONTRAST = 20
"""Grey levels by which a dot or spot differs from what is around it."""
_FRAME_PX = 64


def _symmetry(scene: Scene) -> dict[str, float]:
    """Mirror overlap about both principal axes, in a frame aligned with them."""
    moments = cv2.moments(scene.lesion.astype(np.uint8), binaryImage=True)
    x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    angle = 0.5 * np.arctan2(2 * moments["mu11"], moments["mu20"] - moments["mu02"])
    # 3.6 standard deviations hold every convex shape and most others.
    reach = 3.6 * np.sqrt(max(moments["mu20"], moments["mu02"]) / moments["m00"])
    cosine, sine = np.cos(angle) * reach, np.sin(angle) * reach
    half = (_FRAME_PX - 1) / 2
    to_frame = np.array(
        [
            [cosine / half, -sine / half, x - cosine + sine],
            [sine / half, cosine / half, y - sine - cosine],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (_FRAME_PX, _FRAME_PX)
    shape = cv2.warpAffine(scene.lesion.astype(np.float32), to_frame, size, flags=flags) > 0.5
    lab = cv2.warpAffine(scene.lab, to_frame, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    missed, differs = [], []
    for axis in (0, 1):
        mirrored = np.flip(shape, axis)
        both = shape & mirrored
        missed.append(1 - both.sum() / max(1, shape.sum()))
        distance = np.linalg.norm(lab - np.flip(lab, axis), axis=2)
        differs.append(float(distance[both].mean()) if both.any() else 0.0)
    return {"asymmetry": float(max(missed)), "colour_asymmetry": max(differs)}


def _border(scene: Scene, contrast: float) -> dict[str, float]:
    outlines, _ = cv2.findContours(scene.lesion.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(outlines, key=len)
    area = max(cv2.contourArea(outline), 1.0)
    hull = max(cv2.contourArea(cv2.convexHull(outline)), 1.0)
    # A staircase of pixels is longer than the line it draws: smooth the outline over 5 points first.
    points = outline[:, 0].astype(np.float32)
    smooth = sum(np.roll(points, shift, axis=0) for shift in range(-2, 3)) / 5
    perimeter = float(np.linalg.norm(smooth - np.roll(smooth, 1, axis=0), axis=1).sum())
    lesion = scene.lesion.astype(np.uint8)
    inner = scene.lesion & ~cv2.erode(lesion, disc(5)).astype(bool)
    outer = cv2.dilate(lesion, disc(3)).astype(bool) & ~scene.lesion & scene.field
    step = 0.0
    if inner.any() and outer.any():
        step = float(np.linalg.norm(np.median(scene.lab[inner], axis=0) - np.median(scene.lab[outer], axis=0)))
    return {
        "border_irregularity": 1 - area / max(hull, area),
        "compactness": perimeter**2 / (4 * np.pi * area),
        "border_sharpness": step / max(contrast, 1.0),
    }


def _colour_names(lab: Floats, skin_lab: npt.NDArray[np.floating]) -> npt.NDArray[np.int8]:
    """Index into `COLOURS` of each pixel, -1 for the colour of the skin, (h, w).

    Part of what separates this skin's hue from that of skin in general is the light's cast (`_CAST_SHARE`); a cast
    multiplies, so dark pixels carry less of it. White is relative to the skin; the others are absolute.
    """
    skin_lightness = max(float(skin_lab[0]), 1.0)
    share = _CAST_SHARE * np.clip(lab[..., 0] / skin_lightness, 0, 1.2)
    lightness = lab[..., 0]
    a = lab[..., 1] + share * np.float32(_REFERENCE_AB[0] - skin_lab[1])
    b = lab[..., 2] + share * np.float32(_REFERENCE_AB[1] - skin_lab[2])
    chroma, skin_chroma = np.hypot(a, b), float(np.hypot(*_REFERENCE_AB))
    distance = np.linalg.norm(lab - skin_lab.astype(np.float32), axis=2)
    # Dark red and dark brown are close in hue, salmon and light brown are not; what is pale is less colourful, and a
    # dull pink differs from light brown in hue alone.
    is_reddish = (a > 20) & (b < np.where(lightness < 0.6 * skin_lightness, 0.65, 0.85) * a)
    is_rosy = ((lightness >= 56) & (a > 16) & (b < a)) | ((lightness >= 50) & (a > 14) & (a <= 20) & (b < 0.9 * a))
    rules: tuple[tuple[Colour | None, Mask], ...] = (
        (None, distance < 8),
        ("black", (lightness < 14) | ((lightness < 20) & (chroma < 10))),
        ("white", (lightness > skin_lightness + 5) & (chroma < skin_chroma)),
        # The bluer, the more violet it may be: blue pigment is seen through red blood.
        ("blue-grey", (b < 6) & (a < 14 - 0.8 * np.minimum(b, 0)) & (lightness < 70)),
        ("pink", is_rosy),
        ("red", is_reddish & (lightness >= 20)),
        ("light brown", lightness >= 42),
        ("dark brown", np.ones_like(is_reddish)),
    )
    names = [-1 if colour is None else COLOURS.index(colour) for colour, _ in rules]
    return np.select([mask for _, mask in rules], [np.int8(name) for name in names]).astype(np.int8)


def _colour_fractions(names: npt.NDArray[np.int8], scene: Scene) -> dict[str, float]:
    visible = _visible(scene, 4)
    counts = np.bincount(names[visible] + 1, minlength=len(COLOURS) + 1)[1:]
    total = max(1, int(visible.sum()))
    return {
        colour.replace(" ", "_").replace("-", "_"): float(count) / total
        for colour, count in zip(COLOURS, counts, strict=True)
    }


def _visible(scene: Scene, margin: int) -> Mask:
    """The lesion without its outermost `margin` pixels and without hairs; the whole lesion if nothing is left."""
    inner = cv2.erode(scene.lesion.astype(np.uint8), disc(margin)).astype(bool) & ~scene.hair
    return inner if inner.any() else scene.lesion


def _centre_lightness(scene: Scene) -> float:
    depth = cv2.distanceTransform(scene.lesion.astype(np.uint8), cv2.DIST_L2, 3)
    inside = depth[scene.lesion]
    lightness = scene.lab[..., 0][scene.lesion]
    inner, outer = inside >= np.quantile(inside, 2 / 3), inside <= np.quantile(inside, 1 / 3)
    return float(np.median(lightness[inner]) - np.median(lightness[outer]))


def _structures(scene: Scene, lab: Floats) -> dict[str, float]:
    visible = _visible(scene, 3)
    grey = cv2.cvtColor(scene.rgb, cv2.COLOR_RGB2GRAY)
    dark = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, disc(3))
    bright = cv2.morphologyEx(grey, cv2.MORPH_TOPHAT, disc(3))
    mesh = visible & (dark > 6)
    outlines, tree = cv2.findContours(mesh.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    num_holes = 0 if tree is None else int((tree[0, :, 3] >= 0).sum())
    middle = float(np.median(grey[visible]))
    return {
        "network_fraction": float(mesh.sum()) / float(visible.sum()),
        "num_mesh_holes": num_holes,
        "mesh_density": num_holes / float(visible.sum()) * 1e-3 * scene.lesion.shape[1] ** 2,
        "num_dark_dots": _num_round(visible & ((dark > _SPOT_CONTRAST) & (grey < middle - 10))),
        "num_bright_spots": _num_round(visible & ((bright > _SPOT_CONTRAST) & (grey > middle + 10))),
        "num_red_blobs": _num_round(visible & _red_cores(lab, visible), most_px=600, least_px=12),
    }


def _red_cores(lab: Floats, visible: Mask) -> Mask:
    """Pixels redder or darker than the lesion's middle, and red."""
    median = np.median(lab[visible], axis=0)
    return np.asarray((lab[..., 1] > 22) & (lab[..., 2] < 0.9 * lab[..., 1]) & (lab[..., 0] < median[0] - 5))


def _num_round(mask: Mask, *, least_px: int = 3, most_px: int = 60) -> int:
    """Number of components that fill their bounding box as a disc does."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    _, _, width, height, area = stats[1:].T
    fills = area / np.maximum(width * height, 1)
    is_round = (np.minimum(width, height) >= 0.5 * np.maximum(width, height)) & (fills > 0.5)
    return int((is_round & (area >= least_px) & (area <= most_px)).sum())
