"""Shapes of a DiT: its configuration, refused where it does not fit, and the named ones."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from derm_pipeline.models.conditions import TEXT, TEXT_MASK


class DiTConfig(BaseModel):
    """Shape of a DiT."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dit"] = "dit"
    """Which network this is."""
    latent_size: int = Field(ge=1)
    """Side of the square latent, in cells; a multiple of `patch`."""
    channels: int = Field(default=4, ge=1)
    """Latent channels."""
    patch: int = Field(default=2, ge=1)
    """Side of a patch, in cells: one patch is one token."""
    width: int = Field(ge=4)
    """Features per token; a multiple of 4 and of `heads`."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden features of a block's MLP, as a multiple of `width`."""
    conditions: dict[str, int]
    """Name of each condition and its number of classes, in order; the null class is one more, at the end."""
    text_tokens: int = Field(default=0, ge=0)
    """Tokens of the text embeddings that it is told beside the conditions, padding included; 0 for no text."""
    text_width: int = Field(default=0, ge=0)
    """Features of a token of the text embeddings: 768 of CLIP ViT-L/14, 4096 of T5-XXL; 0 for no text."""
    text_mode: Literal["pooled", "cross"] = "pooled"
    """pooled: the text is one vector, added to the other conditions; cross: each block attends to its tokens too."""
    learn_sigma: bool = False
    """Whether the output has twice the channels, the second half telling the variance (Nichol and Dhariwal 2021)."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head, which keeps low-precision training stable."""
    positions: Literal["sincos", "rotary"] = "sincos"
    """sincos: a fixed table, added to the tokens (the public DiT); rotary: queries and keys are turned by place."""
    condition_init_std: float = Field(default=0.02, gt=0)
    """Deviation of the condition tables at the start: 0.02 in the public DiT; 1 learns classes in far fewer steps."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> DiTConfig:
        if self.latent_size % self.patch:
            raise ValueError(
                f"latent_size {self.latent_size} is not a multiple of patch {self.patch}: take latent_size "
                f"{_nearest(self.latent_size, self.patch)}, or patch {_divisors(self.latent_size)}"
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width {self.width} is not a multiple of 4 and of heads {self.heads}: take width "
                f"{_nearest(self.width, math.lcm(4, self.heads))}"
                + ("" if self.width % 4 else f", or heads {_divisors(self.width)}")
            )
        if self.positions == "rotary" and (self.width // self.heads) % 4:
            raise ValueError(
                f"rotary positions need heads of a multiple of 4 features; width {self.width} / heads {self.heads} = "
                f"{self.width // self.heads}: take heads {_divisors(self.width // 4)}, or positions sincos"
            )
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves the MLP without features")
        return self

    @model_validator(mode="after")
    def _something_is_told(self) -> DiTConfig:
        for name, num_classes in self.conditions.items():
            if not name.isidentifier() or num_classes < 1:
                raise ValueError(
                    f"condition {name!r} with {num_classes} classes: a plain name and at least 1 class are needed"
                )
            if name in (TEXT, TEXT_MASK) or hasattr(nn.ModuleDict, name):
                raise ValueError(f"a condition cannot be named {name!r}, which means something else: rename it")
        if bool(self.text_tokens) != bool(self.text_width):
            raise ValueError(
                f"text_tokens {self.text_tokens} with text_width {self.text_width}: both for text, or neither"
            )
        if self.text_mode == "cross" and not self.has_text:
            raise ValueError("text_mode cross attends to text: set text_tokens and text_width")
        if not self.conditions and not self.has_text:
            raise ValueError("conditions are empty and there is no text: the network would be told nothing")
        return self

    @property
    def has_text(self) -> bool:
        """Whether it is told text embeddings."""
        return self.text_tokens > 0

    @property
    def side(self) -> int:
        """Tokens along a side of the latent."""
        return self.latent_size // self.patch


def _divisors(number: int) -> str:
    """The divisors of a number in words, the largest eight at most."""
    found = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return " or ".join(str(divisor) for divisor in found[-8:])


def _nearest(number: int, step: int) -> str:
    """The multiples of `step` (> 0) on both sides of a number, in words."""
    below = number // step * step
    return " or ".join(str(multiple) for multiple in (below, below + step) if multiple)


DIT_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
"""Depth, width and heads of the public sizes; each comes with patch 2, 4 and 8 (Peebles and Xie 2023, table 1)."""

DIT_PRESETS: dict[str, dict[str, int | bool]] = {
    f"{size}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch": patch, "learn_sigma": True}
    for size, (depth, width, heads) in DIT_SIZES.items()
    for patch in (2, 4, 8)
} | {
    "DiT": {"depth": 6, "width": 384, "heads": 6, "patch": 2, "learn_sigma": False},
    "DiT-B": {"depth": 24, "width": 384, "heads": 12, "patch": 2, "learn_sigma": False},
}
"""The twelve public configurations by name, "XL/2" to "S/8"; and the two of tam7777/DiffusionModel, in its own words:
its "DiT-B" is not the public "B"."""


def preset(
    name: str,
    *,
    latent_size: int,
    conditions: dict[str, int],
    channels: int = 4,
    learn_sigma: bool | None = None,
    **further: object,
) -> DiTConfig:
    """The named configuration ("XL/2" ... "S/8", "DiT", "DiT-B") for a latent size and conditions of one's own.

    Args:
        name: A key of `DIT_PRESETS`.
        latent_size: See `DiTConfig`, as for all that follows.
        conditions: Name and number of classes of each.
        channels: Latent channels.
        learn_sigma: None for what the named configuration has: True in the public ones.
        further: More fields of `DiTConfig`, such as `qk_norm`.

    Raises:
        ValueError: no such configuration, or one that does not fit.
    """
    if name not in DIT_PRESETS:
        raise ValueError(f"no DiT preset {name!r}; there are {', '.join(DIT_PRESETS)}")
    asked = {"latent_size": latent_size, "channels": channels, "conditions": conditions} | further
    if learn_sigma is not None:
        asked["learn_sigma"] = learn_sigma
    return DiTConfig.model_validate(DIT_PRESETS[name] | asked)
