"""LesionGen's concept captions and prompts: condition, size, skin tone, colours, site, 7-point criteria.

`jfayyad/LesionGen` ships its prompts ("Melanoma small size on a dark skin tone") but not its captions, and trains on
labels alone, so that the prompts name what was never taught. Our captions begin as the prompts do; the rest follows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from derm_pipeline.captions.known import Known
from derm_pipeline.captions.visual import DescriptorConfig, listed
from derm_pipeline.captions.wording import condition_or_unnamed, place
from derm_pipeline.records import Diagnosis, Modality, SkinTone

CONDITIONS: Final[Mapping[Diagnosis, str]] = {
    Diagnosis.MEL: "Melanoma",
    Diagnosis.BCC: "Basal cell carcinoma",
    Diagnosis.BKL: "Benign keratosis-like lesions",
    Diagnosis.DF: "Dermatofibroma",
    Diagnosis.NV: "Melanocytic nevi",
    Diagnosis.VASC: "Vascular lesions",
    Diagnosis.AKIEC: "Actinic keratoses and intraepithelial carcinoma",
}
"""The seven conditions by LesionGen's names for them, in its order."""

_SIZES_AND_TONES = (("small", SkinTone.DARK), ("large", SkinTone.LIGHT), ("medium", SkinTone.MEDIUM))
GUIDANCES: Final = (3.0, 5.0, 7.5, 10.0)
"""The weights of guidance from which its data set draws."""
NUM_STEPS: Final = (30, 50, 70, 100)
"""The numbers of steps from which its data set draws."""

_COLOURS = ("white", "pink", "red", "light_brown", "dark_brown", "blue_grey", "black")
"""The fields of `descriptors.Measurements` that hold colour fractions."""
_ABSENT = frozenset({"absent", "no", "false", "0"})
_CRITERIA = {
    "pigment_network": "{} pigment network",
    "streaks": "{} streaks",
    "pigmentation": "{} pigmentation",
    "regression_structures": "regression with {}",
    "dots_and_globules": "{} dots and globules",
    "blue_whitish_veil": "{} blue-whitish veil",
    "vascular_structures": "{} vessels",
    "elevation": "{} lesion",
}
"""The 7-point criteria and the elevation as derm7pt's `meta.csv` names them, in the order in which they are said."""
_CRITERIA_IN_OTHER_WORDS = {
    ("blue_whitish_veil", "present"): "blue-whitish veil",
    ("regression_structures", "combinations"): "regression with white and blue areas",
    ("regression_structures", "present"): "regression",
    ("vascular_structures", "within regression"): "vessels within regression",
    ("vascular_structures", "present"): "vessels",
    ("elevation", "true"): "elevated lesion",  # PAD-UFES-20 says yes or no
}


class LesionGenPrompt(NamedTuple):
    """One of the combinations from which LesionGen draws for each image that it makes."""

    text: str
    guidance: float
    """Weight of classifier-free guidance."""
    num_steps: int
    """Number of denoising steps."""

    @property
    def tone(self) -> SkinTone:
        """The skin tone that it asks for."""
        return next(tone for size, tone in _SIZES_AND_TONES if self.text.endswith(_size_and_tone(size, tone)))


def condition_of(diagnosis: Diagnosis) -> str:
    """A diagnosis as LesionGen would call it: one of `CONDITIONS`, else its words, with a capital letter."""
    return CONDITIONS.get(diagnosis) or diagnosis.phrase[:1].upper() + diagnosis.phrase[1:]


def lesiongen_prompts(
    condition: str, guidances: Sequence[float] = GUIDANCES, num_steps: Sequence[int] = NUM_STEPS
) -> list[LesionGenPrompt]:
    """The 48 combinations of 3 prompts, 4 guidance weights and 4 numbers of steps for a condition, in that order.

    Raises:
        ValueError: the condition is empty.
    """
    condition = condition.strip()
    if not condition:
        raise ValueError("the condition is empty; name one, for example 'Melanoma'")
    texts = [f"{condition} {_size_and_tone(size, tone)}" for size, tone in _SIZES_AND_TONES]
    return [LesionGenPrompt(*combination) for combination in itertools.product(texts, guidances, num_steps)]


def lesiongen_single(condition: str) -> LesionGenPrompt:
    """What LesionGen draws where one image of a condition is asked for: small, on dark skin."""
    return LesionGenPrompt(lesiongen_prompts(condition)[0].text, guidance=7.5, num_steps=50)


def _size_and_tone(size: str, tone: SkinTone) -> str:
    return f"{size} size on a {tone} skin tone"


def lesiongen_caption(
    image: Known, measured: Mapping[str, Any] | None = None, config: DescriptorConfig | None = None
) -> str:
    """A caption that begins as the prompts: "Melanoma small size on a dark skin tone, black, on the back, ...".

    Args:
        image: What is known; the skin tone is only ever what the source says, never an estimate.
        measured: What was measured in the picture, by the names of `descriptors.Measurements`: size and colours come
            from here and are not said without, nor of an endoscopic image: what measures looks for a lesion on skin.
        config: From which measurement on a word is said, as in the visual captions; the defaults when left out.
    """
    bounds = config or DescriptorConfig()
    measured = None if image.modality is Modality.ENDOSCOPIC else measured
    size, colours = _size(measured, bounds), _colours(measured, bounds)
    head = CONDITIONS.get(image.diagnosis) if image.diagnosis else None
    if head is None:
        head = condition_or_unnamed(image)
        head = head[:1].upper() + head[1:]
    if size:
        head += f" {size} size"
    if image.skin_tone:
        head += f" on a {image.skin_tone} skin tone"
    return ", ".join(filter(None, [head, colours, place(image.site), *_criteria(image)]))


def _size(measured: Mapping[str, Any] | None, bounds: DescriptorConfig) -> str | None:
    fraction = _measured(measured, "lesion_fraction")
    if not fraction:
        return None
    if fraction < bounds.small_fraction:
        return "small"
    return "large" if fraction > bounds.large_fraction else "medium"


def _colours(measured: Mapping[str, Any] | None, bounds: DescriptorConfig) -> str | None:
    """The lesion's colours, most of it first: "dark brown, black and blue-grey"."""
    fractions = {colour: _measured(measured, colour) for colour in _COLOURS}
    named = [colour for colour in _COLOURS if fractions[colour] >= bounds.colour_fraction]
    words = [
        "blue-grey" if colour == "blue_grey" else colour.replace("_", " ")
        for colour in sorted(named, key=lambda colour: -fractions[colour])
    ]
    return listed(words) if words else None


def _measured(measured: Mapping[str, Any] | None, name: str) -> float:
    """A fraction of a lesion that was found; 0 where nothing was."""
    value = measured.get(name) if measured is not None and measured.get("has_lesion", True) else None
    if value is None or isinstance(value, str):
        return 0.0
    return float(value) if math.isfinite(value) else 0.0


def _criteria(image: Known) -> list[str]:
    """The criteria that are there, in words: "atypical pigment network", "regression with blue areas".

    Of a clinical photograph only the elevation is said: the checklist is of the case's dermoscopic image.
    """
    is_dermoscopic = image.modality is Modality.DERMOSCOPIC
    names = [name for name in _CRITERIA if is_dermoscopic or name == "elevation"]
    given = [(name, image.concepts[name]) for name in names if image.concepts.get(name, "absent") not in _ABSENT]
    return [_CRITERIA_IN_OTHER_WORDS.get((name, value)) or _CRITERIA[name].format(value) for name, value in given]
