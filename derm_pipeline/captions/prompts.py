"""What a captioner is asked about an image, and what it answers."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from derm_pipeline.images import Pixels
from derm_pipeline.records import Modality

FEATURES = {
    Modality.DERMOSCOPIC: "colours, symmetry, border, pigment network, dots and globules, vessels, hairs, skin tone",
    Modality.CLINICAL: "colour, shape, elevation, scale, distribution, surrounding skin, skin tone",
    # Med-Art's own words (Visual Symptom Generator).
    Modality.ENDOSCOPIC: "specific color, shape, surrounding mucosa, surface texture, bleeding condition",
}
"""The visual features that a captioner is asked for, by modality."""

_MAX_LABEL_CHARACTERS = 120


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    text: str
    """All of it."""
    opening: str
    """The words that the answer is asked to start with, without a full stop."""
    label: str | None
    """The class name that was told; None where none was."""


@dataclass(frozen=True)
class Question:
    """One image, with what is asked about it."""

    image: Pixels
    """uint8 RGB, (h, w, 3)."""
    prompt: Prompt
    seed: int
    """Decides what is sampled."""


@dataclass(frozen=True)
class Answer:
    """What came back, word for word."""

    text: str
    is_complete: bool | None
    """Whether the captioner came to an end by itself; None where it does not say."""
    problem: str = ""
    """Why there is no answer, where there is none."""


def make_prompt(modality: Modality, label: str | None = None, *, max_words: int = 100) -> Prompt:
    """The prompt of one image, in the form of Med-Art's Visual Symptom Generator.

    Args:
        modality: Decides which visual features are asked for.
        label: The class name as it is to stand in the caption; None does not tell it and asks that none be named.
        max_words: The length that is asked for.
    """
    opening = f"{'An' if modality is Modality.ENDOSCOPIC else 'A'} {modality} image"
    subject, extra = f"the {modality} image", " Do not name a diagnosis."
    label = None if label is None else clean_label(label)
    if label:
        opening, subject, extra = f"{opening} of {label}", f"{subject} of {label}", ""
    text = (
        f"{opening}. Please describe {subject} using the following visual features: {FEATURES[modality]}, and other "
        f"relevant details.{extra} Start with '{opening}' and ensure the description does not exceed {max_words} words."
    )
    return Prompt(text, opening, label or None)


def clean_label(label: str) -> str:
    """A class name on one line, without what could be read as a chat template's own marks, at most 120 characters."""
    plain = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in label)
    return " ".join(re.sub(r"[<>|\[\]{}]", " ", plain).split())[:_MAX_LABEL_CHARACTERS].strip()
