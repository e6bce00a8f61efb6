"""How a model is optimised: budget, optimiser, schedule, precision, and what is kept or looked at on the way."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from derm_pipeline.models.runtime import Precision

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(BaseModel):
    """How a model is optimised.

    The budget is `num_steps` or `num_images`. Settings that change no weight (how often to save, report, validate or
    draw samples; `micro_batch_size` and `compile`, which change the last bits only) may differ when a training is
    resumed; the others may not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; null where `num_images` says it."""
    num_images: int | None = Field(default=None, ge=1)
    """Examples to be seen in all, repeats counted; rounded up to whole steps."""
    batch_size: int = Field(ge=1)
    """Examples a step, of all processes together."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples that a process holds at once; gradients are accumulated over the rest. null: all of its part."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861): a quarter of their memory; it
    needs bitsandbytes, and is not for fp16."""
    lr: float = Field(gt=0, allow_inf_nan=False)
    """AdamW's peak learning rate."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps over which the rate rises linearly."""
    schedule: Literal["linear", "constant", "cosine", "step"] = "linear"
    """What follows the rise. linear: a plateau, then a linear fall. constant: a plateau. cosine: half a cosine down to
    `final_lr_fraction`. step: the rate times `drop_factor` after every `drop_every_images`."""
    decay_fraction: float = Field(default=0.5, ge=0, le=1)
    """linear: last part of the training over which the rate falls linearly to `final_lr_fraction`."""
    final_lr_fraction: float = Field(default=0.02, ge=0, le=1)
    """linear and cosine: what is left of the rate at the end."""
    drop_every_images: int | None = Field(default=None, ge=1)
    """step: examples between two drops (torch's StepLR counts epochs: ten epochs are ten times the training set)."""
    drop_factor: float = Field(default=0.1, gt=0, le=1)
    """step: what a drop leaves of the rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    decay_matrices_only: bool = False
    """Whether weight decay spares parameters of less than two dimensions: biases and norms."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """AdamW's moment decays."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Gradient norm above which gradients are scaled down; null never does."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the weights, warmed up as (1 + step) / (10 + step); null for no average."""
    ema_decays: tuple[float, ...] = ()
    """Decays of further averages, in (0, 1), kept beside the first."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; weights stay float32. auto: bf16 where the device computes in it. fp16 scales the
    loss, and skips the steps in which a gradient overflows."""
    compile: bool = False
    """Whether the network is compiled: minutes at the start, then faster steps on a GPU; other last bits."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints: what a killed training can lose (one that SIGTERM stops loses nothing)."""
    checkpoint_every_images: int | None = Field(default=None, ge=1)
    """Examples between checkpoints, rounded down to whole steps; in place of `checkpoint_every_steps` where given."""
    report_every_steps: int = Field(default=50, ge=1)
    """Steps between two lines of the curve; only then does the host wait for the device."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between two losses on held-out examples, where there are some; also at the end. null: a tenth of the
    training, and 500 at most."""
    validation_batches: int = Field(default=4, ge=1)
    """Batches of a validation: the same examples, times and noise each time."""
    samples_every_steps: int | None = Field(default=None, ge=1)
    """Steps between two grids of samples, where some are drawn; also at the end. null: a third of the training."""
    seed: int = 0
    """Seed of the initial weights and of every step's random stream."""

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.num_steps or math.ceil((self.num_images or 1) / self.batch_size)

    @property
    def steps_between_checkpoints(self) -> int:
        if self.checkpoint_every_images is None:
            return self.checkpoint_every_steps
        return max(1, self.checkpoint_every_images // self.batch_size)

    @property
    def steps_between_validations(self) -> int:
        return self.validate_every_steps or min(500, math.ceil(self.steps / 10))

    @property
    def steps_between_samples(self) -> int:
        return self.samples_every_steps or math.ceil(self.steps / 3)

    @property
    def decays(self) -> tuple[float, ...]:
        """Of all averages, `ema_decay` first; none twice."""
        return tuple(dict.fromkeys((*((self.ema_decay,) if self.ema_decay else ()), *self.ema_decays)))

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (self.num_steps is None) == (self.num_images is None):
            raise ValueError("give the budget once: num_steps or num_images, and null for the other")
        if self.schedule == "step" and self.drop_every_images is None:
            raise ValueError("schedule: step needs drop_every_images, the examples between two drops of the rate")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not made of micro_batch_size {self.micro_batch_size}; "
                f"take one that divides it, as {largest_divisor(self.batch_size, self.micro_batch_size)}"
            )
        if self.optimizer == "adamw8bit" and self.precision == "fp16":
            raise ValueError("adamw8bit cannot skip a step that overflows: take precision bf16 or fp32, or adamw")
        if any(not 0 < decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decays {list(self.ema_decays)}: each must lie between 0 and 1")
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the usual optimiser: artifacts and checkpoints of before there were several are found again."""
        settings: dict[str, Any] = serialise(self)
        if settings.get("optimizer") == "adamw":
            del settings["optimizer"]
        return settings

    def deciding(self) -> dict[str, object]:
        """The settings that decide the weights: those that a checkpoint must have in common with a resumed training."""
        settings = self.model_dump(mode="json", exclude=_FREE)
        return settings | {"steps": self.steps, "ema_decays": list(self.decays)}


_FREE = {
    "num_steps",
    "num_images",
    "micro_batch_size",
    "compile",
    "ema_decay",
    "checkpoint_every_steps",
    "checkpoint_every_images",
    "report_every_steps",
    "validate_every_steps",
    "validation_batches",
    "samples_every_steps",
}


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`."""
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)


def lr_factor(step: int, config: TrainingConfig) -> float:
    """Learning rate at `step` as a part of the peak: a linear warm-up, times what the schedule leaves."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warm * _left(step, config)


def _left(step: int, config: TrainingConfig) -> float:
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        assert config.drop_every_images is not None  # the config's own validation
        return config.drop_factor ** (step * config.batch_size // config.drop_every_images)
    remaining = 1 - step / config.steps
    if config.schedule == "cosine":
        after_warmup = max(1, config.steps - config.warmup_steps)
        passed = min(1.0, max(0, step - config.warmup_steps) / after_warmup)
        return config.final_lr_fraction + (1 - config.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * passed))
    fall = min(1.0, remaining / config.decay_fraction) if config.decay_fraction else 1.0
    return max(config.final_lr_fraction, fall)


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for one step (splitmix64's mixing, so that neighbours are unrelated)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
