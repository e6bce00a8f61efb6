"""Moving averages of the weights, several decays at once, all parameters in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Averages:
    """Exponential moving averages of a network's trained parameters (Karras et al. 2024, EDM2, keep several, too)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decays: Sequence[float]) -> None:
        self._parameters = parameters
        self.values = {
            decay: [parameter.detach().clone() for parameter in parameters.values()] for decay in dict.fromkeys(decays)
        }
        """Of each decay, the averages in the parameters' order."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average towards the weights; the decay is warmed up as (1 + step) / (10 + step)."""
        weights = [parameter.detach() for parameter in self._parameters.values()]
        for decay, average in self.values.items():
            torch._foreach_lerp_(average, weights, 1 - min(decay, (1 + step) / (10 + step)))

    def states(self, model: nn.Module) -> dict[float, dict[str, Tensor]]:
        """Of each decay, the model's state with the averages in place of the weights."""
        state = model.state_dict()
        return {
            decay: state | dict(zip(self._parameters, average, strict=True)) for decay, average in self.values.items()
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the first average into the model for a while, where there is one."""
        if not self.values:
            yield
            return
        weights = [parameter.data for parameter in self._parameters.values()]
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, next(iter(self.values.values())))
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)
