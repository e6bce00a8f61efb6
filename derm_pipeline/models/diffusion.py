"""From noise to latents: `sample`; and what it works with, for those who need several: laws, guidance, noise.

Samplers are functions of `denoise(x, time)` and a law; they know no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from derm_pipeline.models import samplers
from derm_pipeline.models.guidance import Conditional, Guided, guided
from derm_pipeline.models.laws import DDPM, Denoise, Grid, Law, RectifiedFlow
from derm_pipeline.models.samplers import Start, noise_for

__all__ = [
    "DDPM",
    "Conditional",
    "Denoise",
    "Guided",
    "Law",
    "RectifiedFlow",
    "Solver",
    "Start",
    "guided",
    "noise_for",
    "sample",
]

Solver = Literal["dpm2m", "unipc", "euler", "ddim", "heun", "ddpm"]
"""How the reverse process is solved; see `sample`."""


@torch.no_grad()
def sample(
    denoise: Denoise,
    law: Law,
    noise: Tensor,
    num_steps: int,
    solver: Solver = "dpm2m",
    *,
    seeds: Sequence[int] | Tensor | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    start: Start | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (n, c, h, w) from standard normal noise of that shape; row i depends on row i alone.

    Args:
        denoise: Called without gradients; its prediction is brought to the dtype of `noise`, that of the steps. What
            `guided` gives is asked by noise level.
        law: The law it was trained under.
        noise: See `noise_for`.
        num_steps: Steps; "heun" evaluates twice in each but the last.
        solver: "dpm2m": DPM-Solver++(2M) (arXiv 2211.01095), second order. "unipc": UniPC of order 2
            (arXiv 2302.04867), which corrects each of these steps. "euler" or "ddim": the same step, first order,
            Euler's for a flow and DDIM's for DDPM. "heun": second order in one step. "ddpm": ancestral, with the
            learned variance if there is one; only for DDPM.
        seeds: Seed of each row, needed for the noise of the steps: by "ddpm", and by "ddim" with `eta`.
        spacing: Evaluate at `num_steps` of the DDPM law's own steps, chosen as `posterior.respaced` says: "250",
            "10,15,25", "ddim50". None is `law.grid`, and for "ddpm" the spacing "`num_steps`".
        eta: Part of the posterior's deviation, [0, 1], that "ddim" adds as fresh noise; with 1 it is "ddpm" without a
            learned variance. Only for DDPM.
        start: Latents to begin from, at the level of noise where the steps that are left begin; what they keep is
            kept after every step. None is pure noise.
        on_progress: Called as (steps done, steps in all).

    Raises:
        ValueError: no steps; a solver, spacing or eta that the law does not have; a spacing of another number of
            steps; noise in the steps without one seed a row; a start of another shape, or of no strength in [0, 1].
    """
    if num_steps < 1:
        raise ValueError(f"cannot sample in {num_steps} steps; at least 1 is needed")
    if solver not in get_args(Solver):
        raise ValueError(f"solver {solver!r} is not one of {', '.join(get_args(Solver))}")
    if not 0 <= eta <= 1 or (eta > 0 and (solver != "ddim" or law.kind != "ddpm")):
        raise ValueError(f'eta {eta} with solver "{solver}": give 0, or up to 1 with "ddim" and a DDPM law')
    if solver == "ddpm" or eta > 0:
        _check_seeds(seeds, len(noise), solver)
    grid = _grid(law, num_steps, str(num_steps) if solver == "ddpm" and spacing is None else spacing)
    x = noise
    if start is not None:
        grid, x = _begin(start, grid, noise)
        if len(grid.times) == 0:
            return x
    report = on_progress or (lambda done, total: None)
    stage = samplers.Stage(denoise, law, grid, noise, seeds=seeds, start=start, report=report)
    if solver == "ddim":
        return samplers.ddim(stage, x, eta)
    solvers = {
        "dpm2m": samplers.dpm2m,
        "unipc": samplers.unipc,
        "euler": samplers.first_order,
        "heun": samplers.heun,
        "ddpm": samplers.ancestral,
    }
    return solvers[solver](stage, x)


def _begin(start: Start, grid: Grid, noise: Tensor) -> tuple[Grid, Tensor]:
    """What is left of the grid, and x where it begins: the start's latents with noise, or noise alone."""
    if not 0 <= start.strength <= 1:
        raise ValueError(f"strength {start.strength} is no part of the steps: give 0 (all is kept) to 1 (pure noise)")
    count, _, *sides = noise.shape
    if start.latents.shape != noise.shape or (start.keep is not None and start.keep.shape != (count, 1, *sides)):
        keep = "" if start.keep is None else f" and cells to keep {tuple(start.keep.shape)}"
        raise ValueError(
            f"a start of latents {tuple(start.latents.shape)}{keep} does not fit noise {tuple(noise.shape)}"
        )
    skipped = start.num_skipped(len(grid.times))
    rest = Grid(*(part[skipped:] for part in grid))
    if skipped == 0:
        alpha, sigma = float(grid.alphas[0]), float(grid.sigmas[0])
        kept = noise if start.keep is None else torch.where(start.keep, start.noised(noise, alpha, sigma), noise)
        return rest, kept
    return rest, start.noised(noise, float(rest.alphas[0]), float(rest.sigmas[0]))


def _check_seeds(seeds: Sequence[int] | Tensor | None, num: int, solver: str) -> None:
    if seeds is None or len(seeds) != num:
        count = "no" if seeds is None else len(seeds)
        raise ValueError(f'solver "{solver}" adds noise and needs one seed a row: {count} seeds for {num} rows')


def _grid(law: RectifiedFlow | DDPM, num_steps: int, spacing: str | None) -> Grid:
    if spacing is None:
        return law.grid(num_steps)
    if not isinstance(law, DDPM):
        raise ValueError('solver "ddpm" and a spacing of steps need a DDPM law; a flow has no steps: use "dpm2m"')
    grid = law.spaced(spacing)
    if len(grid.times) != num_steps:
        raise ValueError(f"spacing {spacing!r} retains {len(grid.times)} steps, not {num_steps}; give one of the two")
    return grid
