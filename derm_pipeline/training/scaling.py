"""Loss scaling for fp16, all on the device: no step waits to learn whether a gradient overflowed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_INITIAL = 2.0**16
_GROWS_AFTER = 2000
_LOWEST = 1.0


class LossScale:
    """A power of two that the loss is multiplied with, so that small gradients do not vanish in fp16.

    It is halved when a gradient overflows (that step is skipped) and doubled after 2,000 steps without: the law of
    torch's GradScaler (Micikevicius et al. 2018, arXiv 1710.03740), whose state leaves the device to be saved and which
    cannot be told of a loss that is not finite.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _INITIAL, device=device)
        self.num_sound = torch.zeros((), device=device)
        """Steps since the scale last changed."""

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    @torch.no_grad()
    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place; exact, but for what was lost in the backward pass."""
        torch._foreach_mul_(list(gradients), self.scale.reciprocal())

    @torch.no_grad()
    def update(self, has_overflowed: Tensor) -> Tensor:
        """Adapt the scale to a step's (), bool; True, on the device, where even the lowest scale does not help."""
        is_hopeless = has_overflowed & (self.scale <= _LOWEST)
        grows = self.num_sound + 1 >= _GROWS_AFTER
        sound_scale = torch.where(grows, 2 * self.scale, self.scale)
        self.num_sound.copy_(torch.where(has_overflowed | grows, 0, self.num_sound + 1))
        self.scale.copy_(torch.where(has_overflowed, (0.5 * self.scale).clamp_min(_LOWEST), sound_scale))
        return is_hopeless
