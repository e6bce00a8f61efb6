"""Classifier-free guidance: what a network says when told its conditions, driven away from what it says untold."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from derm_pipeline.models.conditions import SIZE, TEXT, TEXT_PARTS
from derm_pipeline.models.laws import Denoise


class Conditional(Protocol):
    """A network that is told conditions: `DiT`, or anything like it."""

    def __call__(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor], /) -> Tensor: ...

    def null_conditions(self, num: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Guided:
    """`denoise(x, time)` with guidance; `sample` asks it by noise level, so that an interval costs no wait."""

    told: Denoise
    """Without guidance: one evaluation a row."""
    mixed: Denoise
    """With guidance: two evaluations a row, or one where the guidance is 1."""
    interval: tuple[float, float] | None = None
    """Lowest and highest noise level sigma / alpha with guidance; None is all."""

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        if self.interval is not None:
            raise ValueError("guidance within an interval depends on the noise level: call at(level), as sample does")
        return self.mixed(x, time)

    def at(self, level: float) -> Denoise:
        """What denoises at this noise level sigma / alpha, in [0, inf]."""
        low, high = self.interval or (0.0, math.inf)
        return self.mixed if low <= level <= high else self.told


def guided(
    model: Conditional,
    conditions: Mapping[str, Tensor],
    guidance: float,
    *,
    guided_channels: int | None = None,
    guided_by: Collection[str] | None = None,
    interval: tuple[float, float] | None = None,
    null: Mapping[str, Tensor] | None = None,
) -> Guided:
    """`denoise(x, time)` of a network told `conditions`, with classifier-free guidance (arXiv 2207.12598).

    Args:
        model: The network.
        conditions: Class indices (n,) by condition, for the rows of x.
        guidance: 1 is none and costs one evaluation a row; above 1 exaggerates the conditions and costs two.
        guided_channels: Guide only the first so many channels, and take the others as conditioned: 3 is what the
            public DiT samplers do. None guides all channels of x.
        guided_by: Guide by these conditions only, away from their nulls: the others are told on both sides. None is
            all.
        interval: Guide only at noise levels sigma / alpha from the first to the second, both within; outside, a row
            costs one evaluation (Kynkäänniemi et al. 2024, arXiv 2404.07724, whose sigma is this ratio). The level is
            0 where clean and infinite where pure noise; a flow's time t has level t / (1000 - t). None is all levels.
        null: What is told where nothing is, instead of the network's own nulls: a negative prompt's embeddings, say.
            By condition, of the rows of x; conditions that it does not name keep the network's nulls.

    Raises:
        ValueError: an interval that holds no level; no guided channel; guidance by no or an unknown condition.
    """
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance interval {interval} holds no noise level; give 0 <= low < high (sigma / alpha)")
    if guided_channels is not None and guided_channels < 1:
        raise ValueError(f"cannot guide {guided_channels} channels; give at least 1, or None for all")

    def told(x: Tensor, time: Tensor) -> Tensor:
        return model(x, time, conditions)

    if guidance == 1:
        return Guided(told, told)
    guides = set(conditions if guided_by is None else guided_by) - {SIZE}
    both = _told_and_untold(model, conditions, guides, null or {})

    def mixed(x: Tensor, time: Tensor) -> Tensor:
        told, untold = model(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        count = x.shape[1] if guided_channels is None else guided_channels
        mix = untold[:, :count] + guidance * (told[:, :count] - untold[:, :count])
        return torch.cat([mix, told[:, count:]], dim=1)

    return Guided(told, mixed, interval)


def _told_and_untold(
    model: Conditional, conditions: Mapping[str, Tensor], guided_by: Collection[str], null: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The conditions of the rows of x, then those of the same rows with the null of what they are guided by."""
    if not guided_by or not conditions.keys() >= set(guided_by):
        raise ValueError(f"cannot guide by {sorted(guided_by)}; the network is told {sorted(conditions)}: name some")
    null = model.null_conditions(len(next(iter(conditions.values())))) | dict(null)
    nulled = {*guided_by, *(TEXT_PARTS if TEXT in guided_by else ())}
    return {
        name: torch.cat([told, null[name].to(told.device) if name in nulled else told])
        for name, told in conditions.items()
    }
