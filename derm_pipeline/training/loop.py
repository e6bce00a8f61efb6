"""One loop: optimise, average, checkpoint, resume.

The random stream of a step depends on (seed, step) only, so a resumed training equals an uninterrupted one. The loop
knows nothing of images or noise: it is handed a model and the loss of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from derm_pipeline.models.runtime import Precision, autocast
from derm_pipeline.store import replacing

CHECKPOINT = "checkpoint.safetensors"


class TrainingConfig(BaseModel):
    """How a model is optimised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(ge=1)
    """Examples a step."""
    lr: float = Field(gt=0)
    """AdamW's peak learning rate."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps over which the rate rises linearly."""
    decay_fraction: float = Field(default=0.5, ge=0, le=1)
    """Last part of the training over which the rate falls linearly to `final_lr_fraction`."""
    final_lr_fraction: float = Field(default=0.02, ge=0, le=1)
    """What is left of the rate at the end."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's moment decays."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the weights, warmed up as (1 + step) / (10 + step); None for no average."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; weights stay float32. auto: bf16 where the device computes in it."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints: what an interruption can lose."""
    seed: int = 0
    """Seed of the initial weights and of every step's random stream."""


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the last checkpoint holds the weights of an earlier step."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    losses: list[float]
    """The loss of every step."""
    ema: dict[str, Tensor] | None
    """Moving average of the weights, by parameter name."""
    resumed_from_step: int
    """0 when it ran from the start."""


StepLoss = Callable[[int, torch.Generator], Tensor]
"""(step, the step's own random stream) -> scalar loss."""


def train(
    model: nn.Module,
    step_loss: StepLoss,
    config: TrainingConfig,
    *,
    work: Path,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Train `model` in place, resuming from `work` when a checkpoint lies there.

    Args:
        model: initialised from `config.seed`, so that a run without a checkpoint starts from the same network.
        step_loss: the loss of one step; all its randomness comes from the generator that it is given.
        config: budget, optimiser, precision.
        work: folder of the checkpoint; the caller removes it when the result is safe.
        on_progress: called now and then with (step, steps, mean loss since the last call).

    Raises:
        NonFiniteLossError: before the weights are touched by it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    ema = [parameter.detach().clone() for parameter in parameters] if config.ema_decay else None
    losses: list[float] = []
    first_step = _resume(work / CHECKPOINT, model, optimizer, parameters, ema, losses)
    pending: list[Tensor] = []
    model.train()
    for step in range(first_step, config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(step, config)
        stream = torch.Generator().manual_seed(step_seed(config.seed, step))
        with autocast(device, config.precision):
            loss = step_loss(step, stream)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        is_sound = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        # AdamW then skips the update on the device, without asking the host; `_collect` raises at the next report.
        optimizer.found_inf = (~is_sound).float()  # type: ignore[attr-defined]  # torch's GradScaler sets it so, too
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None and config.ema_decay is not None:
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, [parameter.detach() for parameter in parameters], 1 - decay)
        pending.append(torch.where(is_sound, loss.detach(), torch.nan))
        done = step + 1
        saves = done % config.checkpoint_every_steps == 0
        if saves or done % 50 == 0 or done == config.num_steps:
            mean = _collect(pending, losses, done)
            if on_progress:
                on_progress(done, config.num_steps, mean)
        if saves and done < config.num_steps:
            _save(work / CHECKPOINT, model, optimizer, parameters, ema, losses)
    model.eval()
    return Trained(losses, _named(model, ema), first_step)


def lr_factor(step: int, config: TrainingConfig) -> float:
    """Learning rate at `step` as a part of the peak: linear warm-up, plateau, linear decay."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    remaining = 1 - step / config.num_steps
    fall = min(1.0, remaining / config.decay_fraction) if config.decay_fraction else 1.0
    return warm * max(config.final_lr_fraction, fall)


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for one step (splitmix64's mixing, so that neighbours are unrelated)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1


def _collect(pending: list[Tensor], losses: list[float], done: int) -> float:
    values = torch.stack(pending).tolist()
    pending.clear()
    first_step = done - len(values)
    for offset, value in enumerate(values):
        if not math.isfinite(value):
            last = losses[-1] if losses else None
            raise NonFiniteLossError(
                f"the loss or its gradient is not finite at step {first_step + offset} (last finite loss: {last}); "
                "lower the learning rate"
            )
        losses.append(value)
    return sum(values) / len(values)


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    ema: list[Tensor] | None,
    losses: list[float],
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{number}.{name}"] = value
        if ema is not None:
            tensors[f"ema.{number}"] = ema[number]
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)


def _resume(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    ema: list[Tensor] | None,
    losses: list[float],
) -> int:
    if not path.is_file():
        return 0
    tensors = load_file(path, device=str(parameters[0].device))
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    for number, parameter in enumerate(parameters):
        prefix = f"optimizer.{number}."
        optimizer.state[parameter] = {
            name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        if ema is not None:
            ema[number].copy_(tensors[f"ema.{number}"])
    losses.extend(tensors["losses"].tolist())
    return len(losses)


def _named(model: nn.Module, ema: list[Tensor] | None) -> dict[str, Tensor] | None:
    if ema is None:
        return None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return model.state_dict() | dict(zip(names, ema, strict=True))
