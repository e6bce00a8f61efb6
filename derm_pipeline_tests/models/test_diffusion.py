from itertools import pairwise

import numpy as np
import pytest
import torch

from derm_pipeline.models.diffusion import DDPM, RectifiedFlow, guided, noise_for, sample
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.laws import Grid

LAWS = {
    "flow": RectifiedFlow(),
    "v": DDPM(),
    "epsilon": DDPM(prediction="epsilon"),
    "v, cosine": DDPM(schedule="cosine"),
    "epsilon, cosine": DDPM(schedule="cosine", prediction="epsilon"),
}
MEAN, STD = 0.4, 0.5


def coefficients(law, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and sigma at times that may lie between two steps."""
    if law.kind == "flow":
        sigma = time.double() / 1000
        return 1 - sigma, sigma
    ratios = ((1 - law.alphas_cumprod()) / law.alphas_cumprod()).sqrt().log().numpy()
    ratio = np.exp(np.interp(time.double().numpy() * law.num_steps / 1000, np.arange(law.num_steps), ratios))
    alpha = torch.from_numpy(1 / np.sqrt(1 + ratio**2))
    return alpha, alpha * torch.from_numpy(ratio)


def gaussian_denoiser(law, mean: float = MEAN, std: float = STD):
    """The exact prediction where the data are normal, in float64."""

    def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value[:, None, None, None] for value in coefficients(law, time))
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x.double() - alpha * mean)
        noise = (x.double() - alpha * clean) / sigma
        if law.kind == "flow":
            return noise - clean
        return noise if law.prediction == "epsilon" else alpha * noise - sigma * clean

    return denoise


@pytest.mark.parametrize(
    ("solver", "num_steps", "tolerance"), [("dpm2m", 25, 0.012), ("heun", 25, 0.012), ("ddim", 100, 0.02)]
)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_every_solver_carries_noise_to_the_normal_it_was_told_of(law, solver, num_steps, tolerance):
    noise = noise_for(range(8), (1, 16, 16))
    found = sample(gaussian_denoiser(law), law, noise, num_steps, solver)
    assert found.dtype == torch.float32
    exact = MEAN + STD * noise  # the ordinary differential equation of a normal is linear
    assert float((found - exact).abs().max()) < 3 * tolerance * STD
    assert float(found.mean() - exact.mean()) == pytest.approx(0, abs=tolerance * STD)
    assert float(found.std() / exact.std()) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("law", [LAWS["flow"], LAWS["v"]], ids=["flow", "v"])
def test_errors_fall_with_the_steps_and_faster_in_the_second_order(law):
    noise = noise_for([1], (1, 8, 8)).double()

    def error(num_steps: int, solver: str) -> float:
        return float((sample(gaussian_denoiser(law), law, noise, num_steps, solver) - MEAN - STD * noise).abs().max())

    assert error(25, "euler") / error(50, "euler") == pytest.approx(2, rel=0.1)
    assert error(20, "heun") / error(40, "heun") > 3
    assert error(25, "dpm2m") < error(25, "euler") / 5


def test_the_last_step_of_one_is_the_best_guess():
    law = RectifiedFlow()
    for solver in ("dpm2m", "euler", "heun"):
        found = sample(gaussian_denoiser(law), law, noise_for([0], (1, 4, 4)), 1, solver)
        torch.testing.assert_close(found, torch.full_like(found, MEAN))


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_ancestral_sampling_draws_from_the_normal_it_was_told_of(prediction):
    law, seeds = DDPM(prediction=prediction), [5, 6, 7, 8]
    found = sample(gaussian_denoiser(law), law, noise_for(seeds, (1, 48, 48)), 1000, "ddpm", seeds=seeds)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(STD, rel=0.025)


def test_ancestral_sampling_takes_the_variance_that_is_learned():
    law, seeds = DDPM(prediction="epsilon", learned_variance=True), [1, 2]
    exact, noise = gaussian_denoiser(law), noise_for(seeds, (1, 32, 32))
    found = [
        sample(
            lambda x, t, b=bound: torch.cat([exact(x, t), torch.full_like(x, b)], 1),
            law,
            noise,
            10,
            "ddpm",
            seeds=seeds,
        )
        for bound in (-1.0, 1.0)
    ]
    fixed = sample(exact, law.model_copy(update={"learned_variance": False}), noise, 10, "ddpm", seeds=seeds)
    torch.testing.assert_close(found[0], fixed)
    assert float(found[1].std()) > float(found[0].std()) + 0.01


@pytest.mark.parametrize("kind", ["flow", "v"])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_dpm2m_is_the_solver_of_diffusers(kind, num_steps):
    from diffusers import DPMSolverMultistepScheduler

    if kind == "flow":
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    else:
        options = {"prediction_type": "v_prediction", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.double()

    class SameGrid(type(LAWS[kind])):
        def grid(self, num_steps: int) -> Grid:
            alphas = 1 - sigmas if kind == "flow" else (1 + sigmas**2).rsqrt()
            return Grid(scheduler.timesteps.double(), alphas, sigmas if kind == "flow" else sigmas * alphas)

    def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.tanh(2 * x) * torch.cos(time / 300)[:, None, None, None]

    theirs = noise = noise_for(range(3), (4, 8, 8))
    for time in scheduler.timesteps:
        theirs = scheduler.step(denoise(theirs, time.float().expand(3)), time, theirs).prev_sample
    torch.testing.assert_close(sample(denoise, SameGrid(), noise, num_steps), theirs, atol=2e-4, rtol=2e-4)


@pytest.fixture(scope="module")
def network() -> DiT:
    torch.manual_seed(0)
    model = DiT(
        DiTConfig(latent_size=8, width=32, depth=2, heads=2, conditions={"diagnosis": 7, "skin_type": 6})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("solver", ["dpm2m", "euler", "heun", "ddpm"])
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(network, solver):
    law, seeds = (DDPM() if solver == "ddpm" else RectifiedFlow()), list(range(40, 48))
    told = {"diagnosis": torch.arange(8) % 7, "skin_type": torch.arange(8) % 6}

    def draw(rows: slice) -> torch.Tensor:
        denoise = guided(network, {name: classes[rows] for name, classes in told.items()}, 2.0)
        return sample(denoise, law, noise_for(seeds[rows], (4, 8, 8)), 6, solver, seeds=seeds[rows])

    together = draw(slice(None))
    for row in (0, 3, 7):
        torch.testing.assert_close(draw(slice(row, row + 1)), together[row : row + 1], atol=1e-5, rtol=1e-5)


class Recorder:
    """A network that answers with its first condition, in 2c channels, and remembers how many rows it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, x, time, conditions):
        self.asked.append(len(x))
        assert len(x) == len(time) == len(conditions["diagnosis"])
        level = (conditions["diagnosis"] + 10.0 * conditions["skin_type"])[:, None, None, None]
        return torch.cat([level.expand_as(x), 100 + level.expand_as(x)], dim=1)

    def null_conditions(self, num):
        return {"diagnosis": torch.full((num,), 7), "skin_type": torch.full((num,), 6)}


def test_guidance_extrapolates_from_the_null_classes_in_one_batch():
    model, x, time = Recorder(), torch.zeros(3, 4, 2, 2), torch.zeros(3)
    told = {"diagnosis": torch.tensor([0, 1, 2]), "skin_type": torch.tensor([0, 0, 5])}
    level = torch.tensor([0.0, 1.0, 52.0])
    output = guided(model, told, 1.5)(x, time)
    assert model.asked == [6]
    torch.testing.assert_close(output[:, 0, 0, 0], 67 + 1.5 * (level - 67))
    torch.testing.assert_close(output[:, 4, 0, 0], 100 + level)  # the variance is not guided
    partly = guided(model, told, 1.5, guided_channels=3)(x, time)
    torch.testing.assert_close(partly[:, 2, 0, 0], output[:, 2, 0, 0])
    torch.testing.assert_close(partly[:, 3, 0, 0], level)
    torch.testing.assert_close(guided(model, told, 0.0)(x, time)[:, 0, 0, 0], torch.full((3,), 67.0))


def test_no_guidance_costs_one_evaluation_a_row():
    model, x, time = Recorder(), torch.zeros(3, 4, 2, 2), torch.zeros(3)
    told = {"diagnosis": torch.tensor([0, 1, 2]), "skin_type": torch.tensor([0, 0, 5])}
    torch.testing.assert_close(guided(model, told, 1.0)(x, time)[:, 0, 0, 0], torch.tensor([0.0, 1.0, 52.0]))
    assert model.asked == [3]


@pytest.mark.parametrize(("solver", "evaluations"), [("dpm2m", 5), ("euler", 5), ("heun", 9), ("ddpm", 5)])
def test_a_solver_evaluates_as_often_as_it_says_and_reports_each_step(solver, evaluations):
    calls, reports, law = [], [], DDPM()

    def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        calls.append(float(time[0]))
        return torch.zeros_like(x)

    noise = noise_for([0], (1, 2, 2))
    sample(denoise, law, noise, 5, solver, seeds=[0], on_progress=lambda done, total: reports.append((done, total)))
    assert len(calls) == evaluations
    assert reports == [(done, 5) for done in range(1, 6)]
    assert all(before >= after for before, after in pairwise(calls))


def test_noise_belongs_to_its_seed():
    noise = noise_for([3, 11, 3], (4, 8, 8))
    assert noise.shape == (3, 4, 8, 8)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise_for(torch.tensor([11]), (4, 8, 8))[0], noise[1])


def test_streams_of_a_seed_are_independent():
    streams = torch.stack([noise_for([9], (64, 64), stream=stream).flatten() for stream in range(4)])
    assert float((torch.corrcoef(streams) - torch.eye(4)).abs().max()) < 0.06
    assert float((noise_for([10], (64, 64)) - noise_for([9], (64, 64), stream=1)).abs().max()) > 0.1


def test_what_cannot_be_sampled_is_refused():
    noise = noise_for([0], (1, 2, 2))
    with pytest.raises(ValueError, match="0 steps"):
        sample(lambda x, time: x, RectifiedFlow(), noise, 0)
    with pytest.raises(ValueError, match="DDPM law"):
        sample(lambda x, time: x, RectifiedFlow(), noise, 5, "ddpm", seeds=[0])
    with pytest.raises(ValueError, match="one seed a row"):
        sample(lambda x, time: x, DDPM(), noise, 5, "ddpm")
