"""The autoencoder and generator stages of a recipe: which network, and how it is trained.

Those that start from a pretrained base are in `fine_tuning_settings`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from derm_pipeline.captions.metadata import CaptionStyle
from derm_pipeline.models.autoencoder import AutoencoderConfig
from derm_pipeline.models.diffusion import Law, RectifiedFlow
from derm_pipeline.models.dit import DiTConfig
from derm_pipeline.models.generator import NetworkConfig
from derm_pipeline.models.text_encoder import TextEncoderConfig
from derm_pipeline.models.unet import UNetConfig
from derm_pipeline.training.config import TrainingConfig
from derm_pipeline.training.grids import GridConfig

Condition = Literal["diagnosis", "skin_type", "sex", "age_band", "site"]


class AutoencoderTraining(BaseModel):
    """An autoencoder that is trained on the recipe's own images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["trained"] = "trained"
    """Trained here; `pretrained` takes a published one (`PretrainedVaeConfig`)."""
    network: AutoencoderConfig = AutoencoderConfig()
    """Shape and loss."""
    training: TrainingConfig
    """Budget and optimiser."""


class TextConditioning(BaseModel):
    """Captions as a condition, by the embeddings of a pretrained text encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: TextEncoderConfig = TextEncoderConfig()
    """Which text encoder."""
    caption: Literal[CaptionStyle, "visual"] | None = None
    """Which caption of an image is told; None is the training set's."""
    mode: Literal["pooled", "cross"] = "cross"
    """pooled: one vector, added to the other conditions; cross: each block attends to the caption's tokens too."""


class GeneratorTraining(BaseModel):
    """What the training of any generator has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    condition_init_std: float = Field(default=1.0, gt=0)
    """Spread of the initial condition embeddings; the reference's 0.02 learns classes too slowly in a short budget."""
    conditions: tuple[Condition, ...] = ("diagnosis", "skin_type")
    """What the generator is told of an image."""
    text: TextConditioning | None = None
    """The caption as a further condition (a DiT's); None tells none. A prompt without a diagnosis, or the reverse, is
    learnt where `condition_dropout_each` is above 0."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Chance that an example's conditions are all hidden, so that guidance has an unconditional prediction."""
    condition_dropout_each: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a condition is hidden by itself, besides: for guidance by some conditions only."""
    balance: float = Field(default=1.0, ge=0, le=1)
    """How far the diagnoses are evened out: 0 draws examples as they come, 1 draws every diagnosis equally often."""
    law: Law = RectifiedFlow()
    """The noise law."""
    training: TrainingConfig
    """Budget and optimiser."""
    grid: GridConfig | None = GridConfig()
    """Samples that are drawn on the way, as often as `training.samples_every_steps` says; null: none."""

    @field_validator("conditions")
    @classmethod
    def _once_each(cls, conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
        twice = sorted({name for name in conditions if conditions.count(name) > 1})
        if twice:
            raise ValueError(f"{list(conditions)} names {twice[0]} more than once")
        return conditions

    @model_serializer(mode="wrap")
    def _without_what_is_not_told(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As ever where no text is told: artifacts and checkpoints of before text could be are found again."""
        settings: dict[str, Any] = serialise(self)
        if settings.get("text", ...) is None:
            del settings["text"]
        return settings

    def network(
        self, latent_size: int, channels: int, conditions: Mapping[str, int], text_width: int = 0
    ) -> NetworkConfig:
        """The network for latents (channels, latent_size, latent_size) and conditions with so many classes.

        `text_width` is the features of a text token's embedding, where text is told.

        Raises:
            ValueError: it does not fit; the message says what would.
        """
        learn_sigma = self.law.kind == "ddpm" and self.law.learned_variance
        common = {"latent_size": latent_size, "channels": channels, "conditions": dict(conditions)}
        if self.text is not None:
            common |= {
                "text_tokens": self.text.encoder.max_tokens,
                "text_width": text_width,
                "text_mode": self.text.mode,
            }
        return self._shape(common | {"learn_sigma": learn_sigma, "condition_init_std": self.condition_init_std})

    @abstractmethod
    def _shape(self, common: dict[str, Any]) -> NetworkConfig: ...


class DiTTraining(GeneratorTraining):
    """A diffusion transformer."""

    kind: Literal["dit"] = "dit"
    """Which network."""
    patch: int = Field(default=2, ge=1)
    """Side of the square of latent cells that becomes one token."""
    width: int = Field(default=192, ge=4)
    """Features of a token."""
    depth: int = Field(default=6, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=3, ge=1)
    """Attention heads."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    positions: Literal["sincos", "rotary"] = "sincos"
    """How a token's place is told."""

    def _shape(self, common: dict[str, Any]) -> DiTConfig:
        own = self.model_dump(include={"patch", "width", "depth", "heads", "qk_norm", "positions"})
        return DiTConfig.model_validate(common | own)


class UNetTraining(GeneratorTraining):
    """A latent U-Net."""

    kind: Literal["unet"] = "unet"
    """Which network."""
    widths: tuple[int, ...] = Field(default=(128, 256, 384), min_length=1)
    """Features at each level, from the finest."""
    layers: int = Field(default=2, ge=1)
    """Residual blocks at each level."""
    attention_levels: tuple[int, ...] = (1, 2)
    """Levels whose blocks attend, 0 the finest."""
    head_size: int = Field(default=32, ge=1)
    """Features of an attention head."""
    norm_groups: int = Field(default=32, ge=1)
    """Groups of the group normalisation."""

    @field_validator("text")
    @classmethod
    def _is_told_no_text(cls, text: TextConditioning | None) -> None:
        if text is not None:
            raise ValueError("a U-Net is told no text: leave text out, or take kind: dit")

    def _shape(self, common: dict[str, Any]) -> UNetConfig:
        own = self.model_dump(include={"widths", "layers", "attention_levels", "head_size", "norm_groups"})
        return UNetConfig.model_validate(common | own)
