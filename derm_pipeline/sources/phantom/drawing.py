"""Phantoms: drawn dermoscopy-like images whose truth is known, from a seed and nothing else.

`plan` decides cheaply who is photographed and what is seen; `draw` turns one case into pixels and depends on that case
only, so images can be drawn in any order, by any number of workers and at any size. Patients have several lesions,
lesions several photographs, and malignant lesions are rare on dark skin, as in the real datasets.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from derm_pipeline.records import Diagnosis, Sex, Site, SkinType
from derm_pipeline.sources.phantom.artefacts import draw_bubbles, draw_hair, draw_ink, draw_ruler, draw_vignette
from derm_pipeline.sources.phantom.canvas import Canvas, Pose, Rgb
from derm_pipeline.sources.phantom.lesions import paint_lesion
from derm_pipeline.sources.phantom.truth import PhantomTruth, truth_of

Artefact = Literal["bubbles", "hair", "ink", "ruler", "vignette"]

_ITA = {1: (58.0, 68.0), 2: (44.0, 53.0), 3: (30.5, 38.5), 4: (13.0, 25.0), 5: (-25.0, -4.0), 6: (-52.0, -42.0)}
"""Individual typology angle of each skin type, degrees, inside the classes of Del Bino and Bernerd 2013."""
_SKIN_AB = {1: (14.0, 13.5), 2: (15.0, 15.5), 3: (15.0, 17.5), 4: (14.5, 19.0), 5: (13.5, 17.0), 6: (10.5, 13.0)}
"""CIELAB a* and b* of each skin type."""
_TYPES_BENIGN = (0.14, 0.24, 0.22, 0.16, 0.14, 0.10)
_TYPES_MALIGNANT = (0.22, 0.32, 0.24, 0.12, 0.065, 0.035)
_SUBTLE = (0.45, 0.95)
"""Subtlety of the lesions that are hard to tell, from .. to."""
_TYPICAL_SUBTLETY = 0.1
"""Most that a lesion out of the textbook has."""
_DARK_SUBTLE = 2.0
"""How much more often a lesion on skin of type V or VI is subtle: there its pigment hides in the skin's own."""
_IMAGES_PER_LESION = (0.74, 0.19, 0.06, 0.01)
"""Shares of lesions with 1, 2, 3, 4 photographs: 1.34 on average, as in HAM10000."""
_LESIONS_PER_PATIENT = (0.70, 0.20, 0.10)
DRAWN = tuple(Diagnosis)[:7]
"""The diagnoses that are drawn: HAM10000's seven."""
_R2 = (0.7548776662466927, 0.5698402909980532)
"""Steps of the R2 low-discrepancy sequence (powers of the inverse plastic number)."""


class PhantomConfig(BaseModel):
    """What the drawn dataset holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_images: int = Field(default=3200, ge=1)
    """Number of images. A larger dataset begins with the smaller one's images."""
    width_px: int = Field(default=200, ge=32)
    """Width of each image, pixels."""
    height_px: int = Field(default=150, ge=32)
    """Height of each image, pixels."""
    seed: int = Field(default=0, ge=0)
    """Decides everything that is drawn."""
    akiec: float = Field(default=0.05, ge=0)
    """Relative frequency of lesions with this diagnosis, as are the next six."""
    bcc: float = Field(default=0.07, ge=0)
    """See `akiec`."""
    bkl: float = Field(default=0.12, ge=0)
    """See `akiec`."""
    df: float = Field(default=0.03, ge=0)
    """See `akiec`."""
    mel: float = Field(default=0.13, ge=0)
    """See `akiec`."""
    nv: float = Field(default=0.56, ge=0)
    """See `akiec`."""
    vasc: float = Field(default=0.04, ge=0)
    """See `akiec`."""
    p_hair: float = Field(default=0.25, ge=0, le=1)
    """Share of images with hair."""
    p_ruler: float = Field(default=0.10, ge=0, le=1)
    """Share of images with a ruler's ticks."""
    p_ink: float = Field(default=0.05, ge=0, le=1)
    """Share of images with marker ink."""
    p_bubbles: float = Field(default=0.10, ge=0, le=1)
    """Share of images with gel bubbles."""
    p_vignette: float = Field(default=0.25, ge=0, le=1)
    """Share of images with black corners."""
    p_subtle: float = Field(default=0.22, ge=0, le=1)
    """Share of lesions on skin types I to IV that are hard to tell; on V and VI it is doubled (1 at most)."""
    p_unknown: float = Field(default=0.02, ge=0, le=1)
    """Share of patients without an age and, independently, without a sex; share of lesions without a site."""

    @model_validator(mode="after")
    def _some_diagnosis(self) -> PhantomConfig:
        if sum(self.frequencies) <= 0:
            raise ValueError("the frequencies of the seven diagnoses are all 0; at least one must be positive")
        return self

    @property
    def frequencies(self) -> tuple[float, ...]:
        """The seven relative frequencies in the order of `DRAWN`."""
        return tuple(float(getattr(self, diagnosis.value)) for diagnosis in DRAWN)


@dataclass(frozen=True)
class PhantomCase:
    """One photograph to draw: what is known of it, and the seeds of what is not."""

    image_id: str
    lesion_id: str
    patient_id: str
    diagnosis: Diagnosis
    skin_type: SkinType
    sex: Sex | None
    age_years: int | None
    site: Site | None
    artefacts: tuple[Artefact, ...]
    """Sorted."""
    patient_seed: int
    """Decides the skin's exact colour."""
    lesion_seed: int
    """Decides the lesion's shape, colours and structures."""
    image_seed: int
    """Decides framing, light and what the artefacts look like."""
    subtlety: float = 0.0
    """0 to 1: from a lesion out of the textbook to a brown patch with hardly a trace of what it is."""


@dataclass(frozen=True)
class Phantom:
    """A drawn image and the truth about it."""

    case: PhantomCase
    image: npt.NDArray[np.uint8]
    """RGB (h, w, 3)."""
    lesion_mask: npt.NDArray[np.bool_]
    """(h, w), also where hair or ink covers the lesion."""
    hair_mask: npt.NDArray[np.bool_]
    """(h, w), where a hair is visible."""
    structures: tuple[str, ...]
    """Dermoscopic structures that can be seen, in words; those that the case's subtlety hides are left out."""
    truth: PhantomTruth
    """What the painting shows before light and artefacts."""

    @property
    def diagnosis(self) -> Diagnosis:
        return self.case.diagnosis

    @property
    def skin_type(self) -> SkinType:
        return self.case.skin_type

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        return self.case.artefacts


@dataclass(frozen=True)
class _Habit:
    """Who gets a diagnosis, and where: mean and spread of age, share of men, likely sites."""

    age: tuple[float, float]
    male: float
    sites: tuple[Site, ...]


_BODY = (Site.BACK, Site.TRUNK, Site.ABDOMEN, Site.CHEST, Site.LOWER_EXTREMITY, Site.UPPER_EXTREMITY)
_HABITS = {
    Diagnosis.AKIEC: _Habit((67, 11), 0.65, (Site.FACE, Site.FACE, Site.SCALP, Site.HAND, Site.EAR, *_BODY)),
    Diagnosis.BCC: _Habit((67, 12), 0.60, (Site.FACE, Site.FACE, Site.NECK, Site.EAR, Site.BACK, *_BODY)),
    Diagnosis.BKL: _Habit((64, 13), 0.57, (Site.FACE, Site.FACE, Site.NECK, Site.SCALP, *_BODY)),
    Diagnosis.DF: _Habit((51, 13), 0.45, (Site.LOWER_EXTREMITY,) * 6 + (Site.UPPER_EXTREMITY, Site.TRUNK)),
    Diagnosis.MEL: _Habit((60, 15), 0.62, (*_BODY, *_BODY, Site.FACE, Site.SCALP, Site.FOOT, Site.ACRAL, Site.GENITAL)),
    Diagnosis.NV: _Habit((46, 15), 0.50, (*_BODY, *_BODY, Site.FOOT, Site.HAND, Site.ACRAL, Site.NECK, Site.GENITAL)),
    Diagnosis.VASC: _Habit((52, 18), 0.48, (*_BODY, Site.FACE, Site.HAND)),
}


def plan(config: PhantomConfig) -> list[PhantomCase]:
    """Decide who is photographed and what is seen, without drawing anything.

    The list depends on the settings only, and a larger `num_images` extends it.
    """
    cases: list[PhantomCase] = []
    patient = 0
    while len(cases) < config.num_images:
        cases.extend(_plan_patient(config, patient))
        patient += 1
    return cases[: config.num_images]


def _plan_patient(config: PhantomConfig, patient: int) -> list[PhantomCase]:
    rng = np.random.default_rng([config.seed, patient])
    share = np.array(config.frequencies) / sum(config.frequencies)
    types = np.array([_TYPES_MALIGNANT if diagnosis.is_malignant else _TYPES_BENIGN for diagnosis in DRAWN])
    # A low-discrepancy walk through the frequencies, so that a small dataset holds the rare diagnoses and skins too.
    place = (np.random.default_rng([config.seed]).uniform(size=2) + patient * np.array(_R2)) % 1.0
    first = min(6, int(np.searchsorted(np.cumsum(share), place[0], side="right")))
    skin = min(5, int(np.searchsorted(np.cumsum(types[first]), place[1], side="right")))
    given_skin = share * types[:, skin]
    diagnoses = [first]
    for _ in range(rng.choice(3, p=_LESIONS_PER_PATIENT)):
        diagnoses.append(int(rng.choice(7, p=given_skin / given_skin.sum())))
    habit = _HABITS[DRAWN[first]]
    age = round(float(np.clip(rng.normal(*habit.age), 5, 90)) / 5) * 5
    sex = Sex.MALE if rng.uniform() < habit.male else Sex.FEMALE
    known_age, known_sex = rng.uniform(size=2) >= config.p_unknown
    cases = []
    for lesion, diagnosis in enumerate(diagnoses):
        site = _HABITS[DRAWN[diagnosis]].sites[rng.integers(len(_HABITS[DRAWN[diagnosis]].sites))]
        known_site = rng.uniform() >= config.p_unknown
        lesion_seed = _seed(config.seed, patient, lesion)
        for photo in range(1 + rng.choice(4, p=_IMAGES_PER_LESION)):
            cases.append(
                PhantomCase(
                    image_id=f"PHANTOM_{patient:06d}_{lesion}_{photo}",
                    lesion_id=f"L{patient:06d}_{lesion}",
                    patient_id=f"P{patient:06d}",
                    diagnosis=DRAWN[diagnosis],
                    skin_type=SkinType(skin + 1),
                    sex=sex if known_sex else None,
                    age_years=age if known_age else None,
                    site=site if known_site else None,
                    artefacts=_plan_artefacts(config, rng),
                    patient_seed=_seed(config.seed, patient),
                    lesion_seed=lesion_seed,
                    image_seed=_seed(config.seed, patient, lesion, photo),
                    subtlety=_subtlety(config, lesion_seed, SkinType(skin + 1)),
                )
            )
    return cases


def _subtlety(config: PhantomConfig, lesion_seed: int, skin_type: SkinType) -> float:
    """Most lesions are nearly typical, some are subtle and none lies between."""
    chance, slight, strong = np.random.default_rng([lesion_seed, 1]).uniform(size=3)
    dark = skin_type >= SkinType.V
    if chance < config.p_subtle * (_DARK_SUBTLE if dark else 1.0):
        return float(_SUBTLE[0] + strong * (_SUBTLE[1] - _SUBTLE[0]))
    return float(_TYPICAL_SUBTLETY * slight)


def _plan_artefacts(config: PhantomConfig, rng: np.random.Generator) -> tuple[Artefact, ...]:
    chances: dict[Artefact, float] = {
        "bubbles": config.p_bubbles,
        "hair": config.p_hair,
        "ink": config.p_ink,
        "ruler": config.p_ruler,
        "vignette": config.p_vignette,
    }
    drawn = rng.uniform(size=len(chances))
    return tuple(name for (name, chance), value in zip(chances.items(), drawn, strict=True) if value < chance)


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def draw(case: PhantomCase, width_px: int = 200, height_px: int = 150) -> Phantom:
    """Draw one case; the same case and size give the same pixels, another size the same scene.

    Args:
        case: what to draw, from `plan`.
        width_px: width of the image, at least 32. Structures, hairs and ticks scale with it.
        height_px: height of the image, at least 32.
    """
    if min(width_px, height_px) < 32:
        raise ValueError(f"a phantom needs at least 32 x 32 pixels, not {width_px} x {height_px}")
    skin = _skin_colour(case)
    light = np.random.default_rng([case.image_seed, 0])
    pose = Pose(
        x=float(light.normal(0, 0.02)),
        y=float(light.normal(0, 0.015)),
        angle=float(light.uniform(0, 2 * math.pi)),
        zoom=float(light.uniform(0.92, 1.08)),
    )
    canvas = Canvas(width_px, height_px, skin, pose)
    _texture_skin(canvas, np.random.default_rng([case.patient_seed, 1]))
    bare = canvas.image.copy()
    lesion_mask, structures = paint_lesion(canvas, case.diagnosis, skin, case.lesion_seed, case.subtlety)
    painting = canvas.image.copy()
    _light(canvas, light)
    hair_mask, view = _draw_artefacts(canvas, case, skin)
    image = np.clip(np.rint(canvas.image), 0, 255).astype(np.uint8)
    truth = truth_of(painting, bare, skin, lesion_mask, view)
    return Phantom(case, image, lesion_mask, hair_mask, structures, truth)


def _skin_colour(case: PhantomCase) -> Rgb:
    rng = np.random.default_rng([case.patient_seed, 0])
    a, b = np.array(_SKIN_AB[case.skin_type]) + rng.normal(0, 1, 2) * (1.6, 0.7)
    angle = math.radians(rng.uniform(*_ITA[case.skin_type]))
    lab = np.array([[[50 + b * math.tan(angle), a, b]]], np.float32)
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)[0, 0] * 255, np.float32)


def _texture_skin(canvas: Canvas, rng: np.random.Generator) -> None:
    """Mottle the bare skin: blood and pigment in large patches, furrows and pores in small ones."""
    blood, pigment = canvas.field(rng, 4, 3), canvas.field(rng, 9, 3)
    fine = canvas.grain(rng, 110) + canvas.grain(rng, 55)
    canvas.multiply(1 + np.float32(0.018) * pigment + np.float32(0.016) * fine)
    canvas.image += (np.float32(0.012) * blood)[..., None] * canvas.image * np.array([0.3, -1.0, -0.6], np.float32)


def _light(canvas: Canvas, rng: np.random.Generator) -> None:
    """Exposure, white balance, and a slope of brightness across the image."""
    balance = rng.uniform(0.97, 1.03) * (1 + rng.normal(0, 0.006, 3))
    slope = rng.normal(0, 0.05, 2).astype(np.float32)
    canvas.multiply(np.asarray(1 + slope[0] * canvas.x + slope[1] * canvas.y, np.float32))
    canvas.image *= balance.astype(np.float32)


def _draw_artefacts(
    canvas: Canvas, case: PhantomCase, skin: Rgb
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Draw the case's artefacts; returns where hair is visible and what the instrument sees, each (h, w)."""

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng([case.image_seed, number])

    hair_mask, view = np.zeros(canvas.image.shape[:2], bool), np.ones(canvas.image.shape[:2], bool)
    if "ink" in case.artefacts:
        draw_ink(canvas, rng(1))
    if "hair" in case.artefacts:
        hair_mask = draw_hair(canvas, skin, rng(2))
    if "bubbles" in case.artefacts:
        draw_bubbles(canvas, rng(3))
    if "ruler" in case.artefacts:
        draw_ruler(canvas, rng(4))
    if "vignette" in case.artefacts:
        view = draw_vignette(canvas, rng(5)) > 0.5
        hair_mask &= view
    return hair_mask, view
