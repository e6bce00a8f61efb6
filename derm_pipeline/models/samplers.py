"""The samplers' steps. What a step needs of the law lies on the device before the first one: no step waits for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from derm_pipeline.models.guidance import Guided
from derm_pipeline.models.laws import DDPM, Denoise, Grid, RectifiedFlow, Scale, halves
from derm_pipeline.models.posterior import interpolated_log_variance, posterior


def noise_for(seeds: Sequence[int] | Tensor, shape: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """Standard normal noise (n, *shape), float32 on the CPU, row i from `seeds[i]` (>= 0) alone.

    `stream` gives further, independent noise of the same seeds: `sample` takes stream k for the step that leaves k.
    """
    rows = []
    for seed in seeds:
        state = int(seed) if stream == 0 else _stream_seed(int(seed), stream)
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(state)))
    return torch.stack(rows)


def _stream_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0])


class Ends(NamedTuple):
    """Alpha and sigma where a step starts, then where it ends."""

    alpha: float
    sigma: float
    alpha_to: float
    sigma_to: float

    @property
    def log_length(self) -> float:
        """The way in log signal-to-noise ratio (half of it), in (0, inf]."""
        return _log_ratio(self.alpha_to, self.sigma_to) - _log_ratio(self.alpha, self.sigma)


class Start(NamedTuple):
    """Images to begin from, as latents: img2img (SDEdit, arXiv 2108.01073), and what of them is kept."""

    latents: Tensor
    """Clean latents (n, c, h, w), as the network learnt them."""
    strength: float
    """Part of the steps that is taken, [0, 1]: the last int(num_steps * strength) of them, as diffusers counts. 0 gives
    the latents back; 1 is sampling from pure noise, and sees of them only what is kept."""
    keep: Tensor | None = None
    """Cells that stay as they are, bool (n, 1, h, w): after every step they are the latents with that level of noise
    (blended latent diffusion, arXiv 2206.02779, algorithm 1), in the end the latents themselves."""

    def num_skipped(self, num_steps: int) -> int:
        """Steps that are left out at the beginning."""
        return num_steps - min(int(num_steps * self.strength), num_steps)

    def noised(self, noise: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        """The latents at a level of noise."""
        return alpha * self.latents.to(noise) + sigma * noise


class Stage:
    """What every sampler needs: the network's word on x at a step, noise for it, and coefficients on the device."""

    def __init__(
        self,
        denoise: Denoise,
        law: RectifiedFlow | DDPM,
        grid: Grid,
        like: Tensor,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        start: Start | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.law = law
        self._report = report
        self._start, self._start_noise = start, like
        self._seeds = None if seeds is None else [int(seed) for seed in seeds]
        self._device = like.device
        self._dtype = torch.promote_types(like.dtype, torch.float32)
        self._places = list(zip(grid.alphas.tolist(), grid.sigmas.tolist(), strict=True))
        self._denoise = [
            denoise.at(sigma / alpha if alpha > 0 else math.inf) if isinstance(denoise, Guided) else denoise
            for alpha, sigma in self._places[:-1]
        ]
        self._times = grid.times.to(torch.float32).to(self._device)
        self._alphas = self.table(grid.alphas)
        self._sigmas = self.table(grid.sigmas)

    def __len__(self) -> int:
        return len(self._denoise)

    @property
    def ends(self) -> list[Ends]:
        """Of every step."""
        return [Ends(*self._places[step], *self._places[step + 1]) for step in range(len(self))]

    def table(self, rows: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Coefficients, one row a step, in the arithmetic of the steps and on the device."""
        return torch.as_tensor(rows, dtype=torch.float64).to(self._dtype).to(self._device)

    def output(self, x: Tensor, step: int) -> Tensor:
        """What the network says of x (n, c, h, w) at a step, its variance included."""
        return self._denoise[step](x, self._times[step].expand(len(x))).to(x.dtype)

    def look(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that the network sees in x at a step."""
        return self.split(x, self.output(x, step), step)

    def split(self, x: Tensor, output: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The same, of an output that is there."""
        return self.law.split(x, output[:, : x.shape[1]], self._alphas[step], self._sigmas[step])

    def kept(self, x: Tensor, place: int) -> Tensor:
        """X as it stands where step `place` begins, with the cells that the start keeps at that level of noise."""
        start = self._start
        if start is None or start.keep is None:
            return x
        return torch.where(start.keep, start.noised(self._start_noise, self._alphas[place], self._sigmas[place]), x)

    def end(self, x: Tensor, step: int) -> Tensor:
        """X as a step hands it on; reports the step done."""
        x = self.kept(x, step + 1)
        self._report(step + 1, len(self))
        return x

    def noise(self, x: Tensor, step: int) -> Tensor:
        """Fresh noise of every row's own seed, for a step that is not the last."""
        if self._seeds is None:
            raise ValueError("a sampler that adds noise needs one seed a row")
        noise = noise_for(self._seeds, tuple(x.shape[1:]), stream=len(self) - 1 - step)
        if self._device.type == "cuda":  # a copy of pinned memory is not waited for
            noise = noise.pin_memory()
        return noise.to(x, non_blocking=True)


def first_order(stage: Stage, x: Tensor) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12 with eta 0), which on straight lines is Euler's step."""
    table = stage.table([(ends.alpha_to, ends.sigma_to) for ends in stage.ends])
    for step in range(len(stage)):
        clean, noise = stage.look(x, step)
        x = table[step, 0] * clean + table[step, 1] * noise
        x = stage.end(x, step)
    return x


def ddim(stage: Stage, x: Tensor, eta: float) -> Tensor:
    """DDIM with a part `eta` of the posterior's deviation as fresh noise (arXiv 2010.02502, equations 12 and 16)."""
    if eta == 0:
        return first_order(stage, x)
    rows = []
    for alpha, sigma, alpha_to, sigma_to in stage.ends:
        fresh = eta * sigma_to / sigma * math.sqrt(1 - (alpha / alpha_to) ** 2)
        rows.append((alpha_to, math.sqrt(max(sigma_to**2 - fresh**2, 0.0)), fresh))
    table = stage.table(rows)
    for step in range(len(stage)):
        clean, noise = stage.look(x, step)
        to_clean, to_noise, to_fresh = table[step].unbind()
        x = to_clean * clean + to_noise * noise
        if rows[step][2] > 0:
            x = x + to_fresh * stage.noise(x, step)
        x = stage.end(x, step)
    return x


def dpm2m(stage: Stage, x: Tensor) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); first order in the first and the last step.

    Written out because diffusers' scheduler rounds a flow's times down to whole numbers and starts it at 0.999; on the
    scheduler's own grid the two agree, which a test says.
    """
    all_ends = stage.ends
    table = stage.table([_multistep(all_ends, step) for step in range(len(stage))])
    before = x
    for step in range(len(stage)):
        clean, _ = stage.look(x, step)
        to_x, to_clean, to_change = table[step].unbind()
        expected = clean + to_change * (clean - before) if step > 0 and all_ends[step].sigma_to > 0 else clean
        x = to_x * x + to_clean * expected
        before = clean
        x = stage.end(x, step)
    return x


def unipc(stage: Stage, x: Tensor) -> Tensor:
    """UniPC of order 2 with B(h) = exp(h) - 1, which predicts x0 (arXiv 2302.04867, algorithms 5 to 8).

    The predictor is the step of DPM-Solver++(2M); the look that the next step takes anyway corrects it, to third
    order. Written out for the same reasons, and because diffusers' scheduler solves a system on the device, and waits
    for it, in every step; on the scheduler's own grid the two agree, which a test says.
    """
    all_ends = stage.ends
    predictor = [_multistep(all_ends, step) for step in range(len(stage))]
    corrector = [_correction(all_ends, step) for step in range(len(stage))]
    table = stage.table([(*first, *second) for first, second in zip(predictor, corrector, strict=True)])
    start, clean, before = x, x, x
    for step in range(len(stage)):
        seen, _ = stage.look(x, step)
        if step > 0:
            to_x, to_clean, _, to_change, to_seen = table[step - 1].unbind()
            x = to_x * start + to_clean * (clean + to_change * (clean - before) + to_seen * (seen - clean))
            x = stage.kept(x, step)
        start, clean, before = x, seen, clean if step > 0 else seen
        to_x, to_clean, to_change, _, _ = table[step].unbind()
        x = to_x * x + to_clean * (clean + to_change * (clean - before))
        x = stage.end(x, step)
    return x


def _multistep(all_ends: Sequence[Ends], step: int) -> tuple[float, float, float]:
    """The factors of x, of the expected x0, and of the last change of x0 in it."""
    alpha, sigma, alpha_to, sigma_to = all_ends[step]
    change = 0.0
    if step > 0 and sigma_to > 0:
        change = all_ends[step].log_length / (2 * all_ends[step - 1].log_length)
    return sigma_to / sigma, alpha_to - sigma_to * alpha / sigma, change


def _correction(all_ends: Sequence[Ends], step: int) -> tuple[float, float]:
    """The factors, in the expected x0 of a step, of the change of x0 before it and of that within it.

    From pure noise the step is infinitely long; the limit is the trapezoidal rule in alpha / sigma.
    """
    length = all_ends[step].log_length
    if step == 0 or math.isinf(length):
        return 0.0, 0.5
    ratio = -all_ends[step - 1].log_length / length
    b1 = -1 / length - 1 / math.expm1(-length)
    b2 = 2 * ((math.expm1(-length) / -length - 1) / -length - 0.5) / math.expm1(-length)
    rho = (b1 - b2) / (1 - ratio)
    return -rho / ratio, b1 - rho


def heun(stage: Stage, x: Tensor) -> Tensor:
    """Heun's method along the law's path (as arXiv 2206.00364, algorithm 1, without its added noise)."""
    rows = []
    for ends in stage.ends:
        place, *slope = stage.law.path(ends.alpha, ends.sigma)
        place_to, *slope_to = stage.law.path(ends.alpha_to, ends.sigma_to)
        rows.append((ends.alpha_to, ends.sigma_to, *slope, *slope_to, (place_to - place) / 2))
    table = stage.table(rows)
    for step in range(len(stage)):
        clean, noise = stage.look(x, step)
        alpha_to, sigma_to, d_alpha, d_sigma, d_alpha_to, d_sigma_to, half_way = table[step].unbind()
        trial = alpha_to * clean + sigma_to * noise
        if step + 1 < len(stage):
            clean_to, noise_to = stage.look(trial, step + 1)
            slopes = d_alpha * clean + d_sigma * noise + d_alpha_to * clean_to + d_sigma_to * noise_to
            trial = x + half_way * slopes
        x = trial
        x = stage.end(x, step)
    return x


def ancestral(stage: Stage, x: Tensor) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) on respaced steps, variance the posterior's or learned."""
    kept = torch.tensor([ends.alpha for ends in stage.ends], dtype=torch.float64).square()
    steps = posterior(kept.flip(0))
    columns = (steps.mean_clean, steps.mean_noised, steps.log_variance, steps.log_beta)
    table = stage.table(torch.stack(columns, dim=1).flip(0))
    for step in range(len(stage)):
        output = stage.output(x, step)
        clean, _ = stage.split(x, output, step)
        to_clean, to_x, log_variance, log_beta = table[step].unbind()
        if stage.law.kind == "ddpm" and stage.law.learned_variance:
            _, variance = halves(output, x.shape[1])
            log_variance = interpolated_log_variance(variance, log_variance, log_beta)
        x = to_clean * clean + to_x * x
        if step + 1 < len(stage):
            x = x + torch.exp(0.5 * log_variance) * stage.noise(x, step)
        x = stage.end(x, step)
    return x


def _log_ratio(alpha: float, sigma: float) -> float:
    if alpha == 0 or sigma == 0:
        return -math.inf if alpha == 0 else math.inf
    return math.log(alpha / sigma)
