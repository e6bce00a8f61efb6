"""Classifier-free guidance: what a network says when told its conditions, driven away from what it says untold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
    interval: tuple[float, float] | None = None,
) -> Guided:
    """`denoise(x, time)` of a network told `conditions`, with classifier-free guidance (arXiv 2207.12598).

    Args:
        model: The network.
        conditions: Class indices (n,) by condition, for the rows of x.
        guidance: 1 is none and costs one evaluation a row; above 1 exaggerates the conditions and costs two.
        guided_channels: Guide only the first so many channels, and take the others as conditioned: 3 is what the
            public DiT samplers do. None guides all channels of x.
        interval: Guide only at noise levels sigma / alpha from the first to the second, both within; outside, a row
            costs one evaluation (Kynkäänniemi et al. 2024, arXiv 2404.07724, whose sigma is this ratio). The level is
            0 where clean and infinite where pure noise; a flow's time t has level t / (1000 - t). None is all levels.

    Raises:
        ValueError: an interval that holds no level; fewer guided channels than 1; guidance of no condition.
    """
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance interval {interval} holds no noise level; give 0 <= low < high (sigma / alpha)")
    if guided_channels is not None and guided_channels < 1:
        raise ValueError(f"cannot guide {guided_channels} channels; give at least 1, or None for all")

    def told(x: Tensor, time: Tensor) -> Tensor:
        return model(x, time, conditions)

    if guidance == 1:
        return Guided(told, told)
    if not conditions:
        raise ValueError(f"guidance {guidance} needs a condition to guide by; use 1 for a network that is told none")
    num = len(next(iter(conditions.values())))
    null = model.null_conditions(num)
    both = {name: torch.cat([classes, null[name].to(classes.device)]) for name, classes in conditions.items()}

    def mixed(x: Tensor, time: Tensor) -> Tensor:
        told, untold = model(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        count = x.shape[1] if guided_channels is None else guided_channels
        mix = untold[:, :count] + guidance * (told[:, :count] - untold[:, :count])
        return torch.cat([mix, told[:, count:]], dim=1)

    return Guided(told, mixed, interval)
