from itertools import pairwise

import numpy as np
import pytest
import torch

from derm_pipeline.models.diffusion import DDPM, RectifiedFlow, guided, noise_for, sample
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.posterior import respaced

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
    ("solver", "num_steps", "tolerance"),
    [("dpm2m", 25, 0.012), ("unipc", 25, 0.012), ("heun", 25, 0.012), ("ddim", 100, 0.02)],
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


def test_the_last_step_of_one_is_the_best_guess():
    law = RectifiedFlow()
    for solver in ("dpm2m", "unipc", "euler", "heun"):
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


@pytest.mark.parametrize("solver", ["dpm2m", "unipc", "euler", "heun", "ddpm"])
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(network, solver):
    law, seeds = (DDPM() if solver == "ddpm" else RectifiedFlow()), list(range(40, 48))
    told = {"diagnosis": torch.arange(8) % 7, "skin_type": torch.arange(8) % 6}

    def draw(rows: slice) -> torch.Tensor:
        denoise = guided(network, {name: classes[rows] for name, classes in told.items()}, 2.0)
        return sample(denoise, law, noise_for(seeds[rows], (4, 8, 8)), 6, solver, seeds=seeds[rows])

    together = draw(slice(None))
    for row in (0, 3, 7):
        torch.testing.assert_close(draw(slice(row, row + 1)), together[row : row + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("solver", "evaluations"), [("dpm2m", 5), ("unipc", 5), ("euler", 5), ("heun", 9), ("ddpm", 5)]
)
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


def spaced(law, spacing: str, num_steps: int, solver, **options) -> list[float]:
    times: list[float] = []

    def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        times.append(float(time[0]))
        return torch.zeros_like(x)

    sample(denoise, law, noise_for([0], (1, 2, 2)), num_steps, solver, seeds=[0], spacing=spacing, **options)
    return times


@pytest.mark.parametrize("solver", ["dpm2m", "unipc", "ddim", "ddpm"])
@pytest.mark.parametrize("spacing", ["50", "5,3,9", "ddim50"])
def test_respaced_steps_are_visited_from_the_last_to_the_first(solver, spacing):
    retained = respaced(1000, spacing)
    assert spaced(DDPM(), spacing, len(retained), solver) == retained[::-1]


def test_respaced_steps_of_a_law_of_other_length_are_on_the_scale_of_a_thousand():
    assert spaced(DDPM(num_steps=40), "4", 4, "ddpm") == [975, 650, 325, 0]


def test_what_cannot_be_sampled_is_refused():
    noise = noise_for([0, 1], (1, 2, 2))
    wrong = [
        ("0 steps", RectifiedFlow(), 0, {}),
        ("DDPM law", RectifiedFlow(), 5, {"solver": "ddpm", "seeds": [0, 1]}),
        ("DDPM law", RectifiedFlow(), 5, {"spacing": "5"}),
        ("one seed a row: no seeds for 2 rows", DDPM(), 5, {"solver": "ddpm"}),
        ("one seed a row: 1 seeds for 2 rows", DDPM(), 5, {"solver": "ddpm", "seeds": [0]}),
        ("one seed a row", DDPM(), 5, {"solver": "ddim", "eta": 0.5}),
        ("'5,5' retains 10 steps, not 5", DDPM(), 5, {"spacing": "5,5"}),
        ("eta 0.5", RectifiedFlow(), 5, {"solver": "ddim", "eta": 0.5, "seeds": [0, 1]}),
        ("eta 0.5", DDPM(), 5, {"solver": "dpm2m", "eta": 0.5, "seeds": [0, 1]}),
        ("eta 1.5", DDPM(), 5, {"solver": "ddim", "eta": 1.5, "seeds": [0, 1]}),
        ("'plms' is not one of dpm2m, unipc", DDPM(), 5, {"solver": "plms"}),
    ]
    for message, law, num_steps, options in wrong:
        with pytest.raises(ValueError, match=message):
            sample(lambda x, time: x, law, noise, num_steps, **options)
