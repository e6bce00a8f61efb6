"""AdamW, with its moments in 32 bits or in 8, and what a checkpoint keeps of either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from derm_pipeline.training.config import TrainingConfig


def make_optimizer(weights: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of these weights. It skips a step of which `found_inf`, a tensor set on it, is not 0.

    Raises:
        ValueError: bitsandbytes is asked for, and is not there.
    """
    groups: list[dict[str, object]] = [{"params": weights}]
    if config.decay_matrices_only:
        matrices = [weight for weight in weights if weight.ndim >= 2]
        others = [weight for weight in weights if weight.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        return _eight_bit()(groups, **common)
    return torch.optim.AdamW(groups, **common, fused=True)


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer adamw8bit needs bitsandbytes: pip install 'derm_pipeline[bitsandbytes]', or take adamw"
        ) from error

    class Guarded(AdamW8bit):
        """A step that is not sound goes by gradients of 0: no weight becomes NaN before the loop raises."""

        found_inf: Tensor

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad = torch.where(self.found_inf > 0, 0.0, weight.grad)
            return super().step(closure)

    return Guarded


def kept_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimiser keeps of a parameter, by name: "step" and the moments; its constants are left out."""
    kept = {}
    for kind, value in optimizer.state[parameter].items():
        if not kind.startswith("qmap"):
            kept[kind] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return kept


def start_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, num_steps: int) -> None:
    """The optimiser's state of a parameter as it makes it before its first step, `num_steps` steps being done."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        step = torch.full((), float(num_steps), device=parameter.device)
        optimizer.state[parameter] = {"step": step} | moments
        return
    eight_bit: Any = optimizer
    for place, group in enumerate(eight_bit.param_groups):
        for number, own in enumerate(group["params"]):
            if own is parameter:
                eight_bit.init_state(group, parameter, place, number)
                eight_bit.state[parameter]["step"] = num_steps
