"""The generator stage of a recipe that starts from a pretrained base: what of it is trained, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from derm_pipeline.captions.skin_diff import INITIALISER_WORD, INVERSION_TEMPLATES, skin_diff_token
from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.lora import LoraConfig
from derm_pipeline.models.pretrained.config import PretrainedConfig
from derm_pipeline.training.config import TrainingConfig
from derm_pipeline.training.grids import GridConfig
from derm_pipeline.training.hldf import HldfConfig


class _Stage(BaseModel):
    """What every stage has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: TrainingConfig
    """Budget and optimiser. What an average is kept of (`ema_decay`) goes on as the average."""


class LoraStage(_Stage):
    """Adapters on the denoiser, on the text encoders or on both; all else stands still."""

    kind: Literal["lora"] = "lora"
    """What is trained."""
    denoiser: LoraConfig | None = None
    """The denoiser's adapter."""
    text: LoraConfig | None = None
    """The adapter of each text encoder. Then texts are embedded in the step, not beforehand."""

    @model_validator(mode="after")
    def _adapts_something(self) -> Self:
        if self.denoiser is None and self.text is None:
            raise ValueError("a lora stage adapts the denoiser, the text encoders (text) or both; neither is named")
        return self


class FullStage(_Stage):
    """All weights of the denoiser, in float32."""

    kind: Literal["full"] = "full"
    """What is trained."""


class InversionStage(_Stage):
    """Textual inversion (Gal et al. 2022, arXiv 2208.01618): a new token for each diagnosis, all at once.

    Only their embeddings are trained; an image trains the token of its own diagnosis. No caption is dropped.
    """

    kind: Literal["inversion"] = "inversion"
    """What is trained."""
    tokens: dict[str, str] | None = None
    """The token of each diagnosis; null: skin_diff's, as "mel-class"."""
    initialiser: str = Field(default=INITIALISER_WORD, min_length=1)
    """The word from whose embedding every token starts: one token of the base's."""
    num_vectors: int = Field(default=1, ge=1, le=64)
    """Embeddings that a token stands for."""
    templates: tuple[str, ...] = Field(default=INVERSION_TEMPLATES, min_length=1)
    """What is told of an image, with {} in the place of the token; drawn anew for every example."""

    @field_validator("templates")
    @classmethod
    def _has_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"the template {wrong[0]!r} must have {{}} once, where the token goes")
        return templates

    def tokens_of(self, diagnoses: tuple[str, ...]) -> dict[str, str]:
        """The token of each of these diagnoses.

        Raises:
            ValueError: a diagnosis without a token, or two with the same.
        """
        if self.tokens is None:
            return {diagnosis: skin_diff_token(diagnosis) for diagnosis in diagnoses}
        missing = [diagnosis for diagnosis in diagnoses if diagnosis not in self.tokens]
        if missing:
            raise ValueError(f"inversion.tokens has none for {', '.join(missing)}")
        tokens = {diagnosis: self.tokens[diagnosis] for diagnosis in diagnoses}
        if len(set(tokens.values())) < len(tokens):
            raise ValueError(f"inversion.tokens {tokens}: every diagnosis needs a token of its own")
        return tokens


Stage = Annotated[LoraStage | FullStage | InversionStage, Field(discriminator="kind")]
"""One stage, told apart by `kind`."""


class PriorConfig(BaseModel):
    """Prior preservation (DreamBooth, arXiv 2208.12242): every second example of a batch is one of the base's own.

    They are samples of the base, told what it is told of them. Real images of other diagnoses would teach those
    instead: that is what naming them in the training set does. They stay latents: no image is decoded and encoded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What their mean loss counts beside that of the training images."""
    prompts: tuple[str, ...] = Field(default=("a photo of skin",), min_length=1)
    """What the base is asked for, in turn."""
    num_samples: int = Field(default=200, ge=1)
    """How many are drawn, once."""
    num_steps: int = Field(default=30, ge=1)
    """Steps of DPM-Solver++(2M) of each."""
    guidance: float = Field(default=7.5, ge=1, allow_inf_nan=False)
    """Classifier-free guidance of each."""
    batch_size: int = Field(default=8, ge=1)
    """Drawn at once."""
    seed: int = 0
    """The first one's; the others' follow."""


class FineTuning(BaseModel):
    """A generator that starts from a pretrained base, told captions; trained in one stage or several in turn.

    The law is the base's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pretrained"] = "pretrained"
    """Which network."""
    base: PretrainedConfig
    """Where it starts."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """What is trained, in turn: each kind once at most, in the order inversion, full, lora. Each starts from what the
    one before left."""
    balance: float = Field(default=0.0, ge=0, le=1)
    """How far the diagnoses are evened out: 0 draws examples as they come, 1 draws every diagnosis equally often."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that an example is told the empty text. Published bases know it already; 0.1 is what they learnt it by."""
    min_snr_gamma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Ceiling of the loss weight in signal-to-noise ratio, usually 5 (arXiv 2303.09556); null weighs all alike."""
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """Deviation of noise that is one number for each channel of an example, added to the noise of its cells: what
    lets very dark and very light images be learnt; 0.05 to 0.1 is usual."""
    prior: PriorConfig | None = None
    """Prior preservation, in all stages but inversion; null: none."""
    hldf: HldfConfig | None = None
    """Med-Art's loss of drawn images, in all stages but inversion; null: none."""
    activation_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass rather than kept: less memory, a third more time."""
    grid: GridConfig | None = GridConfig(guidance=7.5)
    """Samples that are drawn on the way, as often as each stage's `samples_every_steps` says; null: none."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """Classes that it is told: none."""
        return ()

    @property
    def training(self) -> TrainingConfig:
        """Of the last stage."""
        return self.stages[-1].training

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.training.steps for stage in self.stages)

    @property
    def further_texts(self) -> tuple[str, ...]:
        """Texts that are told beside the captions: with their embeddings in the cache none has to be made."""
        return self.prior.prompts if self.prior else ()

    def law(self, own: DDPM) -> DDPM:
        """What is trained under, given the base's law."""
        return own.model_copy(update={"min_snr_gamma": self.min_snr_gamma})

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        kinds = [stage.kind for stage in self.stages]
        if kinds != [kind for kind in _ORDER if kind in kinds]:
            raise ValueError(f"stages {kinds}: each kind once at most, in the order {', '.join(_ORDER)}")
        odd = [stage for stage in self.stages if stage.training.batch_size % 2 and stage.kind != "inversion"]
        if self.prior and odd:
            raise ValueError(
                f"prior preservation takes every second example: batch_size {odd[0].training.batch_size} must be even"
            )
        return self

    def tokens(self, diagnoses: tuple[str, ...]) -> Mapping[str, str]:
        """The learned token of each of these diagnoses; none without an inversion."""
        inversions = [stage for stage in self.stages if isinstance(stage, InversionStage)]
        return inversions[0].tokens_of(diagnoses) if inversions else {}


_ORDER = ("inversion", "full", "lora")
