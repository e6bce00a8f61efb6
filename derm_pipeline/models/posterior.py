"""The posterior of a discrete noise law, q(x[k-1] | x[k], x0), and the learned variance that interpolates its bounds.

Ho et al. 2020 (arXiv 2006.11239), equations 6 and 7; Nichol and Dhariwal 2021 (arXiv 2102.09672), equations 4 and 15.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Posterior(NamedTuple):
    """Tables over the steps k of a law, float64 (k,): mean = mean_clean * x0 + mean_noised * x[k]."""

    mean_clean: Tensor
    mean_noised: Tensor
    variance: Tensor
    log_variance: Tensor
    """That of step 0, which is 0, is replaced by that of step 1; by the upper bound where there is no step 1."""
    log_beta: Tensor
    """The upper bound of the log-variance."""


def posterior(alphas_cumprod: Tensor) -> Posterior:
    """The posterior of the law with these cumulative products, float64 (k,): all its steps, or those retained."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    alphas = alphas_cumprod / before
    betas = 1 - alphas
    variance = betas * (1 - before) / (1 - alphas_cumprod)
    second = variance[1:2] if len(variance) > 1 else betas
    return Posterior(
        mean_clean=betas * before.sqrt() / (1 - alphas_cumprod),
        mean_noised=(1 - before) * alphas.sqrt() / (1 - alphas_cumprod),
        variance=variance,
        log_variance=torch.cat([second, variance[1:]]).log(),
        log_beta=betas.log(),
    )


def respaced(num_steps: int, spacing: str) -> list[int]:
    """The steps retained of `num_steps`, rising, by ADM's rules (Dhariwal and Nichol 2021, arXiv 2105.05233).

    Args:
        num_steps: Steps of the law.
        spacing: "N": N steps from the first to the last, spread evenly. "ddimN": every i-th step from 0, for the one
            integer stride i that gives N. "A,B,...": the steps cut into as many equal parts, with so many from each.
            "linspaceN" and "trailingN": N steps from the last, as diffusers' DPM-Solver++ spaces them (see
            `_as_diffusers`).

    Raises:
        ValueError: no such spacing of that many steps.
    """
    if spacing.startswith("ddim"):
        wanted = int(spacing.removeprefix("ddim"))
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == wanted:
                return list(range(0, num_steps, stride))
        raise ValueError(f"no integer stride gives {wanted} of {num_steps} steps; use {wanted!r} without ddim")
    if spacing.startswith(("linspace", "trailing")):
        return _as_diffusers(num_steps, spacing)
    counts = [int(part) for part in spacing.split(",")]
    retained: list[int] = []
    start = 0
    for part, count in enumerate(counts):
        size = num_steps // len(counts) + (part < num_steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"cannot retain {count} of {size} steps; spacing {spacing!r} of {num_steps} steps")
        stride_within = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0  # added up, as ADM does, so that halves round alike
        for _ in range(count):
            retained.append(start + round(place))
            place += stride_within
        start += size
    return retained


def _as_diffusers(num_steps: int, spacing: str) -> list[int]:
    """The steps of DPMSolverMultistepScheduler's `timestep_spacing`, rising; halves are rounded to even, as there.

    "linspace": the first of the N + 1 evenly spread, which is the clean end, is left out. "trailing": every
    `num_steps` / N-th, counted down from the last (Lin et al. 2024, arXiv 2305.08891, table 2).
    """
    kind, count = spacing[:8], int(spacing[8:])
    if not 1 <= count < num_steps:
        raise ValueError(
            f"cannot retain {count} of {num_steps} steps with spacing {spacing!r}; give 1 to {num_steps - 1}"
        )
    if kind == "linspace":
        places = np.linspace(0, num_steps - 1, count + 1)[1:]
    else:
        places = np.arange(num_steps, 0, -num_steps / count)[:count][::-1]  # rounding may add one more, below 0
    return [int(place) - (kind == "trailing") for place in places.round()]


def interpolated_log_variance(output: Tensor, log_variance: Tensor, log_beta: Tensor) -> Tensor:
    """Log-variance between its bounds, for a network output of about [-1, 1] (equation 15)."""
    fraction = (output + 1) / 2
    return fraction * log_beta + (1 - fraction) * log_variance


def variational_bits(
    clean: Tensor, true_mean: Tensor, true_log_variance: Tensor, mean: Tensor, log_variance: Tensor, is_first: Tensor
) -> Tensor:
    """One term of the variational bound, in bits per value (n,), for tensors (n, c, h, w).

    The KL divergence of the model's step from the posterior; at the first step (`is_first`, (n,)) the negative
    log-likelihood of `clean`, discretised to 1/255 of [-1, 1], as the public DiT does it on latents too.
    """
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    likelihood = _discretised_log_likelihood(clean, mean, log_variance)
    bits = torch.where(is_first[:, None, None, None], -likelihood, divergence) / math.log(2)
    return bits.flatten(1).mean(1)


def _discretised_log_likelihood(clean: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around `clean`; the outermost bins reach to infinity."""
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = torch.special.ndtr((clean - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((clean - mean - 1 / 255) * inverse_std)
    upper = torch.where(clean > 0.999, 1.0, upper)
    lower = torch.where(clean < -0.999, 0.0, lower)
    return (upper - lower).clamp_min(1e-12).log()
