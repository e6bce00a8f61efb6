"""From noise to latents: guidance and samplers; and the noise laws, which live in `laws`, for those who need both.

Samplers are functions of `denoise(x, time)` and a law; they know no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from derm_pipeline.models.laws import DDPM, Denoise, Grid, Law, RectifiedFlow, halves
from derm_pipeline.models.posterior import interpolated_log_variance, posterior, respaced

__all__ = ["DDPM", "Conditional", "Denoise", "Law", "RectifiedFlow", "Solver", "guided", "noise_for", "sample"]

Solver = Literal["dpm2m", "euler", "ddim", "heun", "ddpm"]
"""How the reverse process is solved; see `sample`."""


class Conditional(Protocol):
    """A network that is told conditions: `DiT`, or anything like it."""

    def __call__(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor], /) -> Tensor: ...

    def null_conditions(self, num: int, /) -> dict[str, Tensor]: ...


def guided(
    model: Conditional, conditions: Mapping[str, Tensor], guidance: float, *, guided_channels: int | None = None
) -> Denoise:
    """`denoise(x, time)` of a network told `conditions`, with classifier-free guidance (arXiv 2207.12598).

    Args:
        model: The network.
        conditions: Class indices (n,) by condition, for the rows of x.
        guidance: 1 is none and costs one evaluation a row; above 1 exaggerates the conditions and costs two.
        guided_channels: Guide only the first so many channels, and take the others as conditioned: 3 is what the
            public DiT samplers do. None guides all channels of x.
    """
    if guidance == 1:
        return lambda x, time: model(x, time, conditions)
    num = len(next(iter(conditions.values())))
    null = model.null_conditions(num)
    both = {name: torch.cat([classes, null[name].to(classes.device)]) for name, classes in conditions.items()}

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        told, untold = model(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        count = x.shape[1] if guided_channels is None else guided_channels
        mixed = untold[:, :count] + guidance * (told[:, :count] - untold[:, :count])
        return torch.cat([mixed, told[:, count:]], dim=1)

    return denoise


def noise_for(seeds: Sequence[int] | Tensor, shape: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """Standard normal noise (n, *shape), float32 on the CPU, row i from `seeds[i]` (>= 0) alone.

    `stream` gives further, independent noise of the same seeds: `sample` takes stream k for the k-th step of "ddpm".
    """
    rows = []
    for seed in seeds:
        state = int(seed) if stream == 0 else _stream_seed(int(seed), stream)
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(state)))
    return torch.stack(rows)


def _stream_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def sample(
    denoise: Denoise,
    law: Law,
    noise: Tensor,
    num_steps: int,
    solver: Solver = "dpm2m",
    *,
    seeds: Sequence[int] | Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (n, c, h, w) from standard normal noise of that shape; row i depends on row i alone.

    Args:
        denoise: Called without gradients; its prediction is brought to the dtype of `noise`, that of the steps.
        law: The law it was trained under.
        noise: See `noise_for`.
        num_steps: Steps; "heun" evaluates twice in each but the last.
        solver: "dpm2m": DPM-Solver++(2M) (arXiv 2211.01095), second order. "euler" or "ddim": the same step,
            first order, Euler's for a flow and DDIM's for DDPM. "heun": second order in one step. "ddpm": ancestral,
            on steps respaced as in ADM, with the learned variance if there is one; only for DDPM.
        seeds: Seed of each row, needed by "ddpm" for the noise of its steps.
        on_progress: Called as (steps done, `num_steps`).

    Raises:
        ValueError: no steps, or "ddpm" without seeds or with a law that is not DDPM.
    """
    if num_steps < 1:
        raise ValueError(f"cannot sample in {num_steps} steps; at least 1 is needed")
    report = on_progress or (lambda done, total: None)
    if solver == "ddpm":
        return _ancestral(denoise, law, noise, num_steps, seeds, report)
    advance = {"dpm2m": _dpm2m, "euler": _first_order, "ddim": _first_order, "heun": _heun}[solver]
    return advance(_Stage(denoise, law, law.grid(num_steps), report), noise)


class _Stage(NamedTuple):
    """What every deterministic solver needs: the prediction, taken apart, and the coefficients."""

    denoise: Denoise
    law: RectifiedFlow | DDPM
    grid: Grid
    report: Callable[[int, int], None]

    def look(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that the network sees in x at a step."""
        time = self.grid.times[step].to(x.device, torch.float32).expand(len(x))
        prediction = self.denoise(x, time)[:, : x.shape[1]].to(x.dtype)
        return self.law.split(x, prediction, float(self.grid.alphas[step]), float(self.grid.sigmas[step]))

    def ends(self, step: int) -> tuple[float, float, float, float]:
        """The coefficients alpha and sigma where a step starts, then where it ends."""
        alphas, sigmas = self.grid.alphas, self.grid.sigmas
        return float(alphas[step]), float(sigmas[step]), float(alphas[step + 1]), float(sigmas[step + 1])

    def steps(self) -> range:
        return range(len(self.grid.times))


def _first_order(stage: _Stage, x: Tensor) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12 with eta 0), which on straight lines is Euler's step."""
    for step in stage.steps():
        clean, noise = stage.look(x, step)
        _, _, alpha_to, sigma_to = stage.ends(step)
        x = alpha_to * clean + sigma_to * noise
        stage.report(step + 1, len(stage.grid.times))
    return x


def _dpm2m(stage: _Stage, x: Tensor) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); first order in the first and the last step.

    Written out because diffusers' scheduler rounds a flow's times down to whole numbers and starts it at 0.999; on the
    scheduler's own grid the two agree, which a test says.
    """
    before, length_before = x, math.inf
    for step in stage.steps():
        clean, _ = stage.look(x, step)
        alpha, sigma, alpha_to, sigma_to = stage.ends(step)
        length = _log_snr(alpha_to, sigma_to) - _log_snr(alpha, sigma)
        is_second_order = step > 0 and sigma_to > 0
        expected = clean + length / (2 * length_before) * (clean - before) if is_second_order else clean
        x = sigma_to / sigma * x + (alpha_to - sigma_to * alpha / sigma) * expected
        before, length_before = clean, length
        stage.report(step + 1, len(stage.grid.times))
    return x


def _heun(stage: _Stage, x: Tensor) -> Tensor:
    """Heun's method along the law's path (as arXiv 2206.00364, algorithm 1, without its added noise)."""
    for step in stage.steps():
        clean, noise = stage.look(x, step)
        alpha, sigma, alpha_to, sigma_to = stage.ends(step)
        trial = alpha_to * clean + sigma_to * noise
        if sigma_to > 0:
            clean_to, noise_to = stage.look(trial, step + 1)
            place, d_alpha, d_sigma = stage.law.path(alpha, sigma)
            place_to, d_alpha_to, d_sigma_to = stage.law.path(alpha_to, sigma_to)
            slopes = d_alpha * clean + d_sigma * noise + d_alpha_to * clean_to + d_sigma_to * noise_to
            trial = x + (place_to - place) / 2 * slopes
        x = trial
        stage.report(step + 1, len(stage.grid.times))
    return x


def _log_snr(alpha: float, sigma: float) -> float:
    if alpha == 0 or sigma == 0:
        return -math.inf if alpha == 0 else math.inf
    return math.log(alpha / sigma)


def _ancestral(
    denoise: Denoise,
    law: RectifiedFlow | DDPM,
    x: Tensor,
    num_steps: int,
    seeds: Sequence[int] | Tensor | None,
    report: Callable[[int, int], None],
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) on respaced steps, variance the posterior's or learned."""
    if not isinstance(law, DDPM) or seeds is None:
        raise ValueError('solver "ddpm" needs a DDPM law and one seed a row; use "dpm2m" for a flow')
    retained = respaced(law.num_steps, str(num_steps))
    kept = law.alphas_cumprod()[retained]
    tables = posterior(kept)
    for place in reversed(range(num_steps)):
        time = law.times(torch.tensor(float(retained[place]), device=x.device)).expand(len(x))
        output = denoise(x, time).to(x.dtype)
        alpha, sigma = float(kept[place].sqrt()), float((1 - kept[place]).sqrt())
        clean, _ = law.split(x, output[:, : x.shape[1]], alpha, sigma)
        log_variance = tables.log_variance[place].to(x)
        if law.learned_variance:
            _, variance = halves(output, x.shape[1])
            log_variance = interpolated_log_variance(variance, log_variance, tables.log_beta[place].to(x))
        x = float(tables.mean_clean[place]) * clean + float(tables.mean_noised[place]) * x
        if place > 0:
            x = x + torch.exp(0.5 * log_variance) * noise_for(seeds, tuple(x.shape[1:]), stream=place).to(x)
        report(num_steps - place, num_steps)
    return x
