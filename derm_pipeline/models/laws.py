"""Noise laws and their losses.

A law says how noise is mixed in, x_t = alpha x0 + sigma noise, what a network is asked to predict, how times are drawn
and where a sampler evaluates. It knows no network. All tables are float64.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from derm_pipeline.models.posterior import interpolated_log_variance, posterior, respaced, variational_bits

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (n, c, h, w), time (n,) in [0, 1000]) -> prediction (n, c, h, w), or (n, 2c, h, w) with a learned variance."""

Scale = float | Tensor
"""One coefficient for all rows: a number, or a tensor () on their device, which no step has to wait for."""

_LOG_SNR_MIN = -5.1
"""Half log signal-to-noise ratio where sampling starts: a prediction of noise says nothing of x0 below it."""


class Grid(NamedTuple):
    """Where a sampler evaluates: from noise to clean, float64."""

    times: Tensor
    """(k,), falling, in [0, 1000]."""
    alphas: Tensor
    """(k + 1,), rising to 1: the last is clean."""
    sigmas: Tensor
    """(k + 1,), falling to 0."""


class Draw(NamedTuple):
    """All that is random in the loss of a batch, float32; every part may be sliced by rows."""

    times: Tensor
    """(n,), in [0, 1000]."""
    alphas: Tensor
    """(n, 1, 1, 1)."""
    sigmas: Tensor
    """(n, 1, 1, 1)."""
    noise: Tensor
    """(n, c, h, w), standard normal."""


class NoiseLaw(BaseModel):
    """What every law has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def training_loss(self, denoise: Denoise, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of each example (n,), float32, for clean latents (n, c, h, w): `loss` of a new `draw`."""
        return self.loss(denoise, latents, self.draw(tuple(latents.shape), generator))

    def draw(self, latents_shape: tuple[int, ...], generator: torch.Generator) -> Draw:
        """Times, then noise, for latents of this shape (n, c, h, w), from `generator` and on its device.

        A CPU generator gives every device the same; nothing else in a loss is random.
        """
        times, alphas, sigmas = self._draw_times(latents_shape[0], generator)
        noise = torch.randn(latents_shape, generator=generator, device=generator.device)
        return Draw(times, alphas[:, None, None, None], sigmas[:, None, None, None], noise)

    def loss(self, denoise: Denoise, latents: Tensor, draw: Draw) -> Tensor:
        """Loss of each example (n,), float32, for clean latents (n, c, h, w) and what was drawn for them.

        The weighted mean square error of the prediction, and the variational term where the variance is learned.

        Raises:
            ValueError: the variance is to be learned and the network gives none.
        """
        draw = Draw(*(part.to(latents.device) for part in draw))
        noised = draw.alphas * latents + draw.sigmas * draw.noise
        output = denoise(noised, draw.times).float()
        error = output[:, : latents.shape[1]] - self._target(latents, draw)
        weight = self._weight(draw).flatten()
        return weight * error.square().flatten(1).mean(1) + self._variance_loss(output, latents, noised, draw)

    @abstractmethod
    def split(self, x: Tensor, prediction: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise (each n, c, h, w) that a prediction says x is made of."""

    @abstractmethod
    def grid(self, num_steps: int) -> Grid:
        """Where a deterministic sampler of `num_steps` steps evaluates."""

    @abstractmethod
    def path(self, alpha: float, sigma: float) -> tuple[float, float, float]:
        """A parameter u of the way from clean to noise in which it is smooth: u, d alpha / du and d sigma / du."""

    @abstractmethod
    def _draw_times(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Times with their alphas and sigmas, (num,) float32 each."""

    @abstractmethod
    def _target(self, latents: Tensor, draw: Draw) -> Tensor: ...

    def _weight(self, draw: Draw) -> Tensor:
        return torch.ones_like(draw.alphas)

    def _variance_loss(self, output: Tensor, latents: Tensor, noised: Tensor, draw: Draw) -> Tensor:
        return torch.zeros(len(latents), device=latents.device)


class RectifiedFlow(NoiseLaw):
    """Straight lines from data to noise: alpha = 1 - t, sigma = t; predicted: noise - x0 (arXiv 2209.03003)."""

    kind: Literal["flow"] = "flow"
    time_law: Literal["logit-normal", "uniform"] = "logit-normal"
    """How training times are drawn in [0, 1]; logit-normal favours the middle (Esser et al. 2024, arXiv 2403.03206)."""
    logit_mean: float = 0.0
    """Mean of the logit of the time; above 0 favours noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """Deviation of the logit of the time."""

    def split(self, x: Tensor, prediction: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
        return x - sigma * prediction, x + alpha * prediction

    def grid(self, num_steps: int) -> Grid:
        sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return Grid(1000 * sigmas[:-1], 1 - sigmas, sigmas)

    def path(self, alpha: float, sigma: float) -> tuple[float, float, float]:
        return sigma, -1.0, 1.0

    def _draw_times(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        if self.time_law == "uniform":
            sigmas = torch.rand(num, generator=generator, device=generator.device)
        else:
            logits = torch.randn(num, generator=generator, device=generator.device)
            sigmas = torch.sigmoid(self.logit_mean + self.logit_std * logits)
        return 1000 * sigmas, 1 - sigmas, sigmas

    def _target(self, latents: Tensor, draw: Draw) -> Tensor:
        return draw.noise - latents


class DDPM(NoiseLaw):
    """Discrete variance-preserving diffusion: alpha^2 + sigma^2 = 1 (Ho et al. 2020, arXiv 2006.11239)."""

    kind: Literal["ddpm"] = "ddpm"
    prediction: Literal["v", "epsilon"] = "v"
    """What the network predicts: v = alpha noise - sigma x0 (arXiv 2202.00512), or the noise."""
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    """Betas rising linearly; their roots doing so (Stable Diffusion's); or such that alpha is a cosine of time
    (arXiv 2102.09672, equation 17)."""
    num_steps: int = Field(default=1000, ge=2)
    """Steps from clean to noise."""
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    """First beta of the linear schedules."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    """Last beta of the linear schedules."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Ceiling of the loss weight in signal-to-noise ratio, usually 5 (arXiv 2303.09556); None weighs all alike."""
    learned_variance: bool = False
    """Whether the network's second half of channels learns the variance, by a variational term added to the loss."""

    def alphas_cumprod(self) -> Tensor:
        """alpha^2 of every step, float64 (num_steps,)."""
        return _alphas_cumprod(self.schedule, self.num_steps, self.beta_start, self.beta_end)

    def split(self, x: Tensor, prediction: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
        if self.prediction == "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction

    def grid(self, num_steps: int) -> Grid:
        """Equal steps of the angle atan(sigma / alpha), at fractional times (the angle of arXiv 2202.00512)."""
        ratios = ((1 - self.alphas_cumprod()) / self.alphas_cumprod()).sqrt()
        lowest = math.atan(float(ratios[0]))
        highest = math.atan(min(float(ratios[-1]), math.exp(-_LOG_SNR_MIN)))
        angles = torch.linspace(highest, max(highest / num_steps, lowest), num_steps, dtype=torch.float64)
        steps = np.interp(angles.tan().log().numpy(), ratios.log().numpy(), np.arange(self.num_steps))
        angles = torch.cat([angles, torch.zeros(1, dtype=torch.float64)])
        return Grid(self.times(torch.from_numpy(steps)), angles.cos(), angles.sin())

    def path(self, alpha: float, sigma: float) -> tuple[float, float, float]:
        return math.atan2(sigma, alpha), -sigma, alpha

    def spaced(self, spacing: str) -> Grid:
        """Where a sampler evaluates that keeps to the law's own steps, respaced as in ADM; see `posterior.respaced`."""
        retained = torch.tensor(respaced(self.num_steps, spacing)[::-1])
        kept = torch.cat([self.alphas_cumprod()[retained], torch.ones(1, dtype=torch.float64)])
        return Grid(self.times(retained.double()), kept.sqrt(), (1 - kept).sqrt())

    def times(self, steps: Tensor) -> Tensor:
        """The times in [0, 1000] of steps in [0, `num_steps`)."""
        return steps * (1000 / self.num_steps)

    def _tables(self, device: torch.device) -> _Tables:
        return _tables(self.schedule, self.num_steps, self.beta_start, self.beta_end, device)

    def _steps(self, times: Tensor) -> Tensor:
        return (times * (self.num_steps / 1000)).round().long()

    def _draw_times(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        steps = torch.randint(self.num_steps, (num,), generator=generator, device=generator.device)
        tables = self._tables(steps.device)
        return self.times(steps.float()), tables.alphas[steps], tables.sigmas[steps]

    def _target(self, latents: Tensor, draw: Draw) -> Tensor:
        return draw.noise if self.prediction == "epsilon" else draw.alphas * draw.noise - draw.sigmas * latents

    def _weight(self, draw: Draw) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(draw.alphas)
        ratio = (draw.alphas / draw.sigmas).square()
        unit = ratio if self.prediction == "epsilon" else ratio + 1  # what turns this error into the error of x0
        return ratio.clamp_max(self.min_snr_gamma) / unit

    def _variance_loss(self, output: Tensor, latents: Tensor, noised: Tensor, draw: Draw) -> Tensor:
        """The variational term, which trains the variance only: the predicted mean is held fixed."""
        if not self.learned_variance:
            return super()._variance_loss(output, latents, noised, draw)
        prediction, variance = halves(output, latents.shape[1])
        steps = self._steps(draw.times)
        tables = (table[steps][:, None, None, None] for table in self._tables(steps.device))
        _, _, mean_clean, mean_noised, log_variance, log_beta = tables
        if self.prediction == "epsilon":
            guess = (noised - draw.sigmas * prediction.detach()) / draw.alphas
        else:
            guess = draw.alphas * noised - draw.sigmas * prediction.detach()
        return variational_bits(
            latents,
            mean_clean * latents + mean_noised * noised,
            log_variance,
            mean_clean * guess + mean_noised * noised,
            interpolated_log_variance(variance, log_variance, log_beta),
            steps == 0,
        )


Law = Annotated[RectifiedFlow | DDPM, Field(discriminator="kind")]
"""Any law, as a recipe names it by its `kind`."""


@lru_cache(maxsize=16)
def _alphas_cumprod(schedule: str, num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64).square()
    else:
        phases = (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps + 0.008) / 1.008
        curve = torch.cos(phases * math.pi / 2).square()
        betas = (1 - curve[1:] / curve[:-1]).clamp_max(0.999)
    return torch.cumprod(1 - betas, dim=0)


class _Tables(NamedTuple):
    """What a loss looks up by step, float32 (num_steps,) each, on one device."""

    alphas: Tensor
    sigmas: Tensor
    mean_clean: Tensor
    mean_noised: Tensor
    log_variance: Tensor
    log_beta: Tensor


@lru_cache(maxsize=16)
def _tables(schedule: str, num_steps: int, beta_start: float, beta_end: float, device: torch.device) -> _Tables:
    """Kept, so that no training step computes them or waits for their copy to the device."""
    with torch.inference_mode(False):  # first used in a validation, they must serve a training
        kept = _alphas_cumprod(schedule, num_steps, beta_start, beta_end)
        step = posterior(kept)
        tables = (kept.sqrt(), (1 - kept).sqrt(), step.mean_clean, step.mean_noised, step.log_variance, step.log_beta)
        return _Tables(*(table.float().to(device) for table in tables))


def halves(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The prediction and the variance, (n, c, h, w) each, in the output of a network that learns both."""
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"the law learns the variance, so the network must give {2 * channels} channels for {channels}, "
            f"not {output.shape[1]}; build it with learn_sigma"
        )
    prediction, variance = output.chunk(2, dim=1)
    return prediction, variance
