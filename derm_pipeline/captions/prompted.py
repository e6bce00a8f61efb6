"""What all captioners that are asked with a prompt have in common."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.captions.gate import GateConfig
from derm_pipeline.captions.prompts import Answer, Question
from derm_pipeline.images import Pixels


class PromptedConfig(BaseModel):
    """How a captioner is asked, whichever it is. Sampling as in Med-Art's Visual Symptom Generator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    HOW_IT_RUNS: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    """Settings that say how the work is done and not what comes out: a caption made with others is still the same."""

    tell_label: bool = True
    """Whether the class name is told, as Med-Art does: the caption then names it as known. Without it, an answer that
    names a diagnosis is refused."""
    max_words: int = Field(default=100, ge=10)
    """The length that the prompt asks for, words."""
    max_attempts: int = Field(default=3, ge=1, le=20)
    """How often an image is asked about, each time with another seed, before the descriptor's sentence stands in."""
    batch_size: int = Field(default=8, ge=1)
    """Images asked about at once; as many answers are lost when the work is interrupted."""
    seed: int = Field(default=0, ge=0)
    """Decides, with the image and the attempt, what is sampled."""
    max_pixels: int = Field(default=1_500_000, ge=256)
    """Larger images are reduced to at most this number of pixels before the captioner sees them."""
    max_new_tokens: int = Field(default=150, ge=1)
    """Where an answer is cut off, tokens of the captioner."""
    temperature: float = Field(default=0.8, ge=0)
    """Of the sampling; 0 takes the likeliest token each time, and asks once."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample among the likeliest tokens that hold this probability together."""
    gate: GateConfig = GateConfig()
    """What an answer must be."""

    @property
    def num_attempts(self) -> int:
        """How often an image is asked about; without sampling a second answer would be the first one again."""
        return self.max_attempts if self.temperature > 0 else 1

    def identity(self) -> dict[str, Any]:
        """The settings on which the captions depend, as JSON."""
        return self.model_dump(mode="json", exclude=set(self.HOW_IT_RUNS))


class PromptedCaptioner(Protocol):
    """Answers questions about images."""

    name: str
    """As it stands in tables: the kind of its settings."""
    model: str
    """Which weights answer."""

    @property
    def config(self) -> PromptedConfig: ...

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, in order. An answer depends on its own question only, up to floating point.

        Raises:
            OSError, ValueError: the captioner cannot answer at all; the message says why and what to do.
        """
        ...


def seed_of(config_seed: int, sha256: str, attempt: int) -> int:
    """The seed of one attempt at one image, 0 to 2**31 - 1 (which every server takes)."""
    digest = hashlib.sha256(f"{config_seed}/{sha256}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


_MIN_SIDE_PX = 8
_MAX_ASPECT = 16


def within_bounds(image: Pixels, max_pixels: int) -> Pixels:
    """The image with at most `max_pixels` pixels, its sides in proportion.

    So its long side has at most sqrt(max_pixels x aspect) px. One thinner than 8 px or 1:16, which no network reads,
    is then padded with its edge.
    """
    height, width = image.shape[:2]
    if height * width > max_pixels:
        scale = math.sqrt(max_pixels / (height * width))
        size = (max(1, math.floor(width * scale)), max(1, math.floor(height * scale)))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        height, width = image.shape[:2]
    least = max(_MIN_SIDE_PX, math.ceil(max(height, width) / _MAX_ASPECT))
    below, right = max(0, least - height), max(0, least - width)
    if below or right:
        image = np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge")
    return image
