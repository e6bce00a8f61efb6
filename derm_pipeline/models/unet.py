"""The latent U-Net baseline: diffusers' `UNet2DModel`, told the time and several conditions at once.

A residual U-Net with attention at chosen levels (Ho et al. 2020, arXiv 2006.11239; on latents Rombach et al. 2022,
arXiv 2112.10752). Every condition has a table with its null class at the end; the sum of their rows is added to the
code of the time. The network holds no randomness and knows nothing of noise. diffusers is imported when one is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from derm_pipeline.models.conditions import ConditionEmbedder


class UNetConfig(BaseModel):
    """Shape of a latent U-Net."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["unet"] = "unet"
    """Which network."""
    latent_size: int = Field(ge=1)
    """Side of the square latent, in cells; halved from level to level, so a multiple of 2 to the power levels - 1."""
    channels: int = Field(default=4, ge=1)
    """Latent channels."""
    widths: tuple[int, ...] = Field(default=(128, 256, 384), min_length=1)
    """Features at each level, from the finest; multiples of `norm_groups`."""
    layers: int = Field(default=2, ge=1)
    """Residual blocks at each level on the way down; one more on the way up."""
    attention_levels: tuple[int, ...] = (1, 2)
    """Levels whose blocks attend, 0 the finest; where any does, the middle attends too."""
    head_size: int = Field(default=32, ge=1)
    """Features of an attention head; divides the width of every level that attends and of the last."""
    norm_groups: int = Field(default=32, ge=1)
    """Groups of the group normalisation."""
    conditions: dict[str, int] = Field(min_length=1)
    """Name of each condition and its number of classes, in order; the null class is one more, at the end."""
    learn_sigma: bool = False
    """Whether the output has twice the channels, the second half telling the variance (Nichol and Dhariwal 2021)."""
    condition_init_std: float = Field(default=0.02, gt=0)
    """Deviation of the condition tables at the start."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> UNetConfig:
        problems = [*_level_problems(self), *_condition_problems(self.conditions)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _level_problems(config: UNetConfig) -> list[str]:
    problems, last = [], len(config.widths) - 1
    if config.latent_size % 2**last:
        problems.append(
            f"latent_size {config.latent_size} is not a multiple of {2**last}, which the {last + 1} levels of `widths` "
            "need: give fewer levels or another image size"
        )
    for width in config.widths:
        if width < 1 or width % config.norm_groups:
            problems.append(f"width {width} is not a multiple of norm_groups {config.norm_groups}")
    unknown = [level for level in config.attention_levels if not 0 <= level <= last]
    if unknown:
        problems.append(f"attention_levels {unknown} are not among the levels 0 to {last}")
        return problems
    attending = {*config.attention_levels, last} if config.attention_levels else set()
    for level in sorted(attending):
        if config.widths[level] % config.head_size:
            problems.append(
                f"width {config.widths[level]} of level {level} is not a multiple of head_size {config.head_size}"
            )
    return problems


def _condition_problems(conditions: Mapping[str, int]) -> list[str]:
    return [
        f"condition {name!r} with {num_classes} classes: a plain name, no word of torch's, and at least 1 class are "
        "needed"
        for name, num_classes in conditions.items()
        if not name.isidentifier() or hasattr(nn.ModuleDict, name) or num_classes < 1
    ]


UNET_PRESETS: dict[str, dict[str, Any]] = {
    "000-ldm": {"widths": (32, 64, 96), "layers": 2, "attention_levels": ()},
    "S": {"widths": (128, 256, 256), "layers": 2, "attention_levels": (1, 2)},
    "B": {"widths": (256, 512, 512), "layers": 2, "attention_levels": (1, 2)},
}
"""Sizes by name, with 7 classes: "000-ldm" 2.4 M parameters, "S" 27 M, "B" 109 M (DiT-S/2 33 M, DiT-B/2 130 M).
tam7777/DiffusionModel's LDM has 2.2 M; like it, "000-ldm" has three levels and no attention, but its blocks are others
(there: BatchNorm, max-pooling, the time added to each block's input, no residuals)."""


def unet_preset(
    name: str, *, latent_size: int, conditions: dict[str, int], channels: int = 4, learn_sigma: bool = False
) -> UNetConfig:
    """The configuration `name` for a latent size and conditions of one's own.

    Raises:
        ValueError: no such configuration, or the latent size does not fit it.
    """
    if name not in UNET_PRESETS:
        raise ValueError(f"no U-Net preset {name!r}; there are {', '.join(UNET_PRESETS)}")
    return UNetConfig.model_validate(
        {"latent_size": latent_size, "channels": channels, "conditions": conditions, "learn_sigma": learn_sigma}
        | UNET_PRESETS[name]
    )


class UNet(nn.Module):
    """A U-Net over the cells of a latent, told the time and the conditions; it starts as 0."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _body(config)
        features = 4 * config.widths[0]  # of the time's code, as diffusers makes it
        init_std = config.condition_init_std
        self.condition_embedders = nn.ModuleDict(
            {name: ConditionEmbedder(num, features, init_std) for name, num in config.conditions.items()}
        )
        nn.init.zeros_(self.body.conv_out.weight)
        nn.init.zeros_(self.body.conv_out.bias)

    @property
    def is_checkpointing(self) -> bool:
        """Whether training recomputes each block in the backward pass instead of storing it."""
        return bool(self.body.is_gradient_checkpointing)

    @is_checkpointing.setter
    def is_checkpointing(self, value: bool) -> None:
        if value:
            self.body.enable_gradient_checkpointing()
        else:
            self.body.disable_gradient_checkpointing()

    def forward(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Latents (n, c, h, w) at times (n,) to a prediction (n, c, h, w), or (n, 2c, h, w) with `learn_sigma`.

        Args:
            x: Noised latents; h = w = `latent_size`.
            time: In [0, 1000]; 0 is clean, 1000 is noise.
            conditions: Class indices (n,), int64, of every condition; the null class is its number of classes.

        Raises:
            ValueError: the conditions given are not those of the configuration.
        """
        return self.body(x, time, class_labels=self._embed(conditions), return_dict=False)[0]

    def null_conditions(self, num: int) -> dict[str, Tensor]:
        """The null class of every condition for `num` rows: what an unconditional prediction is told."""
        device = self.body.conv_out.weight.device
        return {name: torch.full((num,), count, device=device) for name, count in self.config.conditions.items()}

    def _embed(self, conditions: Mapping[str, Tensor]) -> Tensor:
        """The sum of the conditions' rows (n, d)."""
        if conditions.keys() != self.config.conditions.keys():
            raise ValueError(
                f"the network is told {sorted(conditions)} but was built for {sorted(self.config.conditions)}; "
                "an unknown value is the null class, not a missing condition"
            )
        rows = [self.condition_embedders[name](conditions[name]) for name in self.config.conditions]
        return torch.stack(rows).sum(0)


def _body(config: UNetConfig) -> Any:
    from diffusers import UNet2DModel

    attends = [level in config.attention_levels for level in range(len(config.widths))]
    return UNet2DModel(
        sample_size=config.latent_size,
        in_channels=config.channels,
        out_channels=config.channels * (2 if config.learn_sigma else 1),
        down_block_types=tuple("AttnDownBlock2D" if attending else "DownBlock2D" for attending in attends),
        up_block_types=tuple("AttnUpBlock2D" if attending else "UpBlock2D" for attending in reversed(attends)),
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        attention_head_dim=config.head_size,
        norm_num_groups=config.norm_groups,
        add_attention=any(attends),
        class_embed_type="identity",
    )
