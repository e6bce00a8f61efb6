import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from derm_pipeline.models.diffusion import DDPM, RectifiedFlow, noise_for, sample
from derm_pipeline.models.laws import Grid
from derm_pipeline.models.posterior import respaced

LAWS = {"flow": RectifiedFlow(), "v": DDPM(), "epsilon, cosine": DDPM(schedule="cosine", prediction="epsilon")}
ALL = ["dpm2m", "unipc", "euler", "ddim", "heun", "ddpm"]
MEAN, STD = 0.4, 0.5


def predicted(law, clean, noise, alpha, sigma):
    """What a network says that sees this in x."""
    if law.kind == "flow":
        return noise - clean
    return noise if law.prediction == "epsilon" else alpha * noise - sigma * clean


def between(law, low: float, high: float):
    """The law on a grid of equal steps of log(alpha / sigma), which ends before it is clean."""

    class Between(type(law)):
        def grid(self, num_steps: int) -> Grid:
            ratios = torch.linspace(low, high, num_steps + 1, dtype=torch.float64)
            alphas, sigmas = ratios.sigmoid(), (-ratios).sigmoid()
            if law.kind == "ddpm":
                alphas, sigmas = (2 * ratios).sigmoid().sqrt(), (-2 * ratios).sigmoid().sqrt()
            return Grid(torch.linspace(900, 100, num_steps, dtype=torch.float64), alphas, sigmas)

    return Between(**law.model_dump())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm2m", 2), ("unipc", 3)])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_error_falls_with_the_order_of_the_solver(law, solver, order):
    """For a normal the probability flow is z -> alpha mean + sqrt(alpha^2 std^2 + sigma^2) z, with z fixed."""
    law, z = between(law, -2, 3), noise_for([1], (1, 4, 4)).double()

    def exact(alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z

    def error(num_steps: int) -> float:
        grid = law.grid(num_steps)

        def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            alpha, sigma = (part[int((grid.times - time[0]).abs().argmin())] for part in (grid.alphas, grid.sigmas))
            clean = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
            return predicted(law, clean, (x - alpha * clean) / sigma, alpha, sigma)

        found = sample(denoise, law, exact(grid.alphas[0], grid.sigmas[0]), num_steps, solver)
        return float((found - exact(grid.alphas[-1], grid.sigmas[-1])).abs().max())

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.12)


WEIGHT, PLACES, WIDTH = 0.3, (-1.0, 0.8), 0.25


def mixture_denoiser(law):
    """The exact prediction where the data are a mixture of two normals, in float64."""

    def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        time = float(time[0])
        if law.kind == "flow":
            alpha, sigma = 1 - time / 1000, time / 1000
        else:
            kept = law.alphas_cumprod()
            logs = ((1 - kept) / kept).log().numpy() / 2
            angle = math.atan(math.exp(np.interp(time * law.num_steps / 1000, np.arange(law.num_steps), logs)))
            alpha, sigma = math.cos(angle), math.sin(angle)
        x, variance = x.double(), alpha**2 * WIDTH**2 + sigma**2
        scores = [
            math.log(weight) - (x - alpha * place) ** 2 / (2 * variance)
            for weight, place in zip((WEIGHT, 1 - WEIGHT), PLACES, strict=True)
        ]
        first = torch.sigmoid(scores[0] - scores[1])
        means = [place + alpha * WIDTH**2 / variance * (x - alpha * place) for place in PLACES]
        clean = first * means[0] + (1 - first) * means[1]
        return predicted(law, clean, (x - alpha * clean) / sigma, alpha, sigma)

    return denoise


@pytest.mark.parametrize(
    ("solver", "num_steps", "options"),
    [
        ("dpm2m", 40, {}),
        ("unipc", 40, {}),
        ("heun", 40, {}),
        ("euler", 200, {}),
        ("ddim", 200, {}),
        ("ddim", 200, {"spacing": "200"}),
        ("ddim", 500, {"spacing": "500", "eta": 1.0}),
        ("ddpm", 1000, {}),
    ],
)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_mixture_of_normals_is_reached(law, solver, num_steps, options):
    if law.kind == "flow" and (options or solver == "ddpm"):
        return
    places = (torch.arange(16_384, dtype=torch.float64) + 0.5) / 16_384  # every quantile once: no luck in the noise
    noise = torch.special.ndtri(places).reshape(4, 1, 64, 64)
    found = sample(mixture_denoiser(law), law, noise, num_steps, solver, seeds=range(4), **options).flatten()
    mean = WEIGHT * PLACES[0] + (1 - WEIGHT) * PLACES[1]
    spread = math.sqrt(WEIGHT * PLACES[0] ** 2 + (1 - WEIGHT) * PLACES[1] ** 2 + WIDTH**2 - mean**2)
    assert float(found.mean()) == pytest.approx(mean, abs=0.03)
    assert float(found.std()) == pytest.approx(spread, rel=0.03)
    assert float((found < -0.1).double().mean()) == pytest.approx(WEIGHT, abs=0.02)
    for place, side in zip(PLACES, (found < -0.1, found >= -0.1), strict=True):
        assert float(found[side].mean()) == pytest.approx(place, abs=0.03)
        assert float(found[side].std()) == pytest.approx(WIDTH, rel=0.08)


def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    return torch.tanh(2 * x) * torch.cos(time.double() / 300)[:, None, None, None].to(x.dtype)


@pytest.mark.parametrize("solver", ["dpm2m", "unipc"])
@pytest.mark.parametrize("kind", ["flow", "v"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_multistep_solvers_are_those_of_diffusers_on_its_grid(solver, kind, num_steps):
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    if kind == "flow":
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    else:
        options = {"prediction_type": "v_prediction", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = {"dpm2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[solver](**options)
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.double()

    class SameGrid(type(LAWS[kind])):
        def grid(self, num_steps: int) -> Grid:
            alphas = 1 - sigmas if kind == "flow" else (1 + sigmas**2).rsqrt()
            return Grid(scheduler.timesteps.double(), alphas, sigmas if kind == "flow" else sigmas * alphas)

    theirs = noise = noise_for(range(3), (4, 8, 8))
    for time in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, time.float().expand(3)), time, theirs).prev_sample
    torch.testing.assert_close(sample(network, SameGrid(), noise, num_steps, solver), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["25", "ddim50", "3,5,7"])
def test_ddim_is_the_published_step(spacing, eta):
    """Song et al. 2020, equations 12 and 16, on the retained steps."""
    law, seeds, retained = DDPM(prediction="epsilon"), [3, 4], respaced(1000, spacing)
    x = noise = noise_for(seeds, (2, 4, 4)).double()
    kept = law.alphas_cumprod()[retained]
    for place in reversed(range(len(retained))):
        here, there = kept[place], kept[place - 1] if place else torch.tensor(1.0, dtype=torch.float64)
        epsilon = network(x, torch.full((2,), float(retained[place])))
        fresh = eta * ((1 - there) / (1 - here)).sqrt() * (1 - here / there).sqrt()
        clean = (x - (1 - here).sqrt() * epsilon) / here.sqrt()
        x = there.sqrt() * clean + (1 - there - fresh**2).sqrt() * epsilon
        if place:
            x = x + fresh * noise_for(seeds, (2, 4, 4), stream=place).double()
    found = sample(network, law, noise, len(retained), "ddim", seeds=seeds, spacing=spacing, eta=eta)
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


def test_ddim_with_all_the_noise_is_the_ancestral_sampler():
    law, noise = DDPM(), noise_for([1, 2], (2, 4, 4)).double()
    ways = [("ddim", {"spacing": "30", "eta": 1.0}), ("ddpm", {})]
    found = [sample(network, law, noise, 30, solver, seeds=[1, 2], **options) for solver, options in ways]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["50", "10,15,20"])
def test_the_ancestral_sampler_with_a_learned_variance_is_that_of_the_public_dit(spacing):
    """On the retained steps as a law of its own: betas from the products, log-variance between its bounds."""
    law, seeds, retained = DDPM(prediction="epsilon", learned_variance=True), [7, 8], respaced(1000, spacing)

    def both(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(x, time), torch.sin(3 * x + time[:, None, None, None] / 100)], dim=1)

    x = noise = noise_for(seeds, (2, 4, 4)).double()
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[retained]
    before = np.append(1, kept[:-1])
    betas = 1 - kept / before
    variances = betas * (1 - before) / (1 - kept)
    for place in reversed(range(len(retained))):
        epsilon, raw = both(x, torch.full((2,), float(retained[place]))).chunk(2, dim=1)
        clean = (x - math.sqrt(1 - kept[place]) * epsilon) / math.sqrt(kept[place])
        x = (
            betas[place] * math.sqrt(before[place]) / (1 - kept[place]) * clean
            + (1 - before[place]) * math.sqrt(1 - betas[place]) / (1 - kept[place]) * x
        )
        if place:
            part = (raw + 1) / 2
            log_variance = part * math.log(betas[place]) + (1 - part) * math.log(variances[place])
            x = x + (log_variance / 2).exp() * noise_for(seeds, (2, 4, 4), stream=place)
    found = sample(both, law, noise, len(retained), "ddpm", seeds=seeds, spacing=spacing)
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


def test_a_thousand_ancestral_steps_are_the_sampler_of_000():
    """Its times run from 1000 to 1 and its mean is written in the noise; its network is told the time from 1."""
    seeds, shape = [11, 12], (2, 3, 3)
    betas = np.linspace(1e-4, 0.02, 1000)
    products = np.cumprod(1 - betas)
    x = noise = noise_for(seeds, shape).double()
    for t in range(1000, 0, -1):
        alpha, product, before = 1 - betas[t - 1], products[t - 1], products[t - 2] if t > 1 else 1.0
        epsilon = network(x, torch.full((2,), float(t)))
        x = (x - (1 - alpha) / math.sqrt(1 - product) * epsilon) / math.sqrt(alpha)
        if t > 1:
            deviation = math.sqrt((1 - alpha) * (1 - before) / (1 - product))
            x = x + deviation * noise_for(seeds, shape, stream=t - 1)
    law = DDPM(prediction="epsilon")
    found = sample(lambda x, time: network(x, time + 1), law, noise, 1000, "ddpm", seeds=seeds)
    torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-7)
    single = sample(lambda x, time: network(x, time + 1), law, noise.float(), 1000, "ddpm", seeds=seeds)
    torch.testing.assert_close(single, x.float(), rtol=1e-3, atol=1e-3)


def options_of(solver: str, seeds: list[int]) -> dict:
    return {"ddim": {"eta": 0.7, "spacing": "6", "seeds": seeds}, "ddpm": {"seeds": seeds}}.get(solver, {})


@pytest.mark.parametrize("solver", ALL)
def test_a_row_is_the_same_bits_in_any_company(solver):
    law, seeds = DDPM(), [40, 41, 42, 43, 44]
    noise = noise_for(seeds, (4, 8, 8))
    together = sample(network, law, noise, 6, solver, **options_of(solver, seeds))
    backwards = sample(network, law, noise.flip(0), 6, solver, **options_of(solver, seeds[::-1]))
    assert torch.equal(backwards.flip(0), together)
    for row, seed in enumerate(seeds):
        alone = sample(network, law, noise[row : row + 1], 6, solver, **options_of(solver, [seed]))
        assert torch.equal(alone, together[row : row + 1])


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a value read, and a copy from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.reads += name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            devices = {part.device for part in (*args, result) if isinstance(part, torch.Tensor)}
            self.copies += len(devices) > 1
        return result


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_no_step_waits_for_the_device(law, solver):
    """The device is "meta", which has no values to read: a sampler that needs one fails there."""
    if law.kind == "flow" and solver == "ddpm":
        return
    seen = []
    for num_steps in (4, 9):
        with Waits() as waits:
            noise = torch.empty(3, 4, 8, 8, device="meta")
            found = sample(network, law, noise, num_steps, solver, seeds=[1, 2, 3])
        assert (found.device.type, found.shape, found.dtype) == ("meta", noise.shape, torch.float32)
        seen.append(waits)
    drawn = [num_steps - 1 if solver == "ddpm" else 0 for num_steps in (4, 9)]  # noise sent ahead, not waited for
    assert seen[0].copies - drawn[0] == seen[1].copies - drawn[1] <= 4
    assert seen[0].reads == seen[1].reads
