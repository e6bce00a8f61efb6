import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from derm_pipeline.models.diffusion import DDPM, Law, RectifiedFlow

LAWS = [
    RectifiedFlow(),
    RectifiedFlow(time_law="uniform"),
    DDPM(),
    DDPM(prediction="epsilon"),
    DDPM(schedule="cosine", num_steps=400, min_snr_gamma=5),
    DDPM(prediction="epsilon", min_snr_gamma=5),
]


def latents(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))


def coefficients(law, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if law.kind == "flow":
        sigma = time / 1000
        return 1 - sigma, sigma
    kept = law.alphas_cumprod()[(time * law.num_steps / 1000).round().long()]
    return kept.sqrt(), (1 - kept).sqrt()


def test_the_linear_schedule_is_the_published_one():
    kept = DDPM().alphas_cumprod()
    assert kept.dtype == torch.float64
    np.testing.assert_allclose(kept[[0, 499, 999]].numpy(), [0.9999, 0.0785872429, 4.03582977e-05], rtol=1e-8)


def test_the_cosine_schedule_is_a_cosine():
    kept = DDPM(schedule="cosine").alphas_cumprod()
    curve = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (0, 1, 500, 990)]
    np.testing.assert_allclose(kept[[0, 499, 989]].numpy(), np.array(curve[1:]) / curve[0], rtol=1e-9)
    assert float(kept[-1]) > 0


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_knowing_the_answer_costs_nothing(law):
    clean = latents()

    def oracle(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value[:, None, None, None].double() for value in coefficients(law, time))
        noise = (x - alpha * clean) / sigma
        if law.kind == "flow":
            return noise - clean
        return noise if law.prediction == "epsilon" else alpha * noise - sigma * clean

    loss = law.training_loss(oracle, clean, torch.Generator().manual_seed(1))
    assert loss.shape == (6,)
    assert float(loss.max()) < 1e-6


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_loss_of_silence_is_the_weighted_power_of_the_target(law):
    clean, seen = latents(), {}

    def silent(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, time=time)
        return torch.zeros_like(x)

    loss = law.training_loss(silent, clean, torch.Generator().manual_seed(1))
    alpha, sigma = (value[:, None, None, None].double() for value in coefficients(law, seen["time"]))
    noise = (seen["x"] - alpha * clean) / sigma
    if law.kind == "flow":
        target, weight = noise - clean, 1.0
    else:
        ratio = (alpha / sigma).square()
        target = noise if law.prediction == "epsilon" else alpha * noise - sigma * clean
        unit = ratio if law.prediction == "epsilon" else ratio + 1
        weight = 1.0 if law.min_snr_gamma is None else ratio.clamp_max(law.min_snr_gamma) / unit
    torch.testing.assert_close(loss.double(), (weight * target.square()).mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_generator_is_the_only_randomness(law):
    losses, before = [], torch.random.get_rng_state()
    for seed in (4, 4, 5):
        generator = torch.Generator().manual_seed(seed)
        losses.append(law.training_loss(lambda x, time: x * time[:, None, None, None] / 1000, latents(), generator))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert torch.equal(before, torch.random.get_rng_state())


def times_of(law, n: int = 20_000) -> np.ndarray:
    seen = []
    law.training_loss(
        lambda x, time: (seen.append(time), x)[1], torch.zeros(n, 1, 1, 1), torch.Generator().manual_seed(0)
    )
    return seen[0].double().numpy()


def test_flow_times_follow_the_law_asked_for():
    logits = np.log(times_of(RectifiedFlow(logit_mean=-0.5, logit_std=0.8)) / 1000)
    logits -= np.log1p(-np.exp(logits))
    assert logits.mean() == pytest.approx(-0.5, abs=0.03)
    assert logits.std() == pytest.approx(0.8, abs=0.03)
    uniform = times_of(RectifiedFlow(time_law="uniform"))
    np.testing.assert_allclose(np.quantile(uniform, [0.1, 0.5, 0.9]), [100, 500, 900], atol=15)


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_ddpm_times_are_its_steps_on_the_scale_of_a_thousand(num_steps):
    times = times_of(DDPM(num_steps=num_steps, beta_end=0.2))
    np.testing.assert_allclose(np.unique(times), np.arange(num_steps) * 1000 / num_steps, rtol=1e-6)


def test_the_learned_variance_leaves_the_prediction_alone():
    plain, learned = DDPM(prediction="epsilon"), DDPM(prediction="epsilon", learned_variance=True)
    gradients = []
    for law in (plain, learned):
        output = torch.full((6, 8, 8, 8), 0.1, requires_grad=True)
        law.training_loss(
            lambda x, time, output=output: output, latents(), torch.Generator().manual_seed(2)
        ).sum().backward()
        gradients.append(output.grad)
    torch.testing.assert_close(gradients[0][:, :4], gradients[1][:, :4])
    assert (gradients[0][:, 4:] == 0).all()
    assert (gradients[1][:, 4:] != 0).all()


def test_the_variational_term_vanishes_for_the_true_posterior():
    """A network that knows the noise and takes the lower bound of the variance is the posterior itself."""
    clean = latents(64)
    law = DDPM(prediction="epsilon", learned_variance=True)

    def oracle(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value[:, None, None, None].double() for value in coefficients(law, time))
        return torch.cat([(x - alpha * clean) / sigma, torch.full_like(x, -1.0)], dim=1)

    loss = law.training_loss(oracle, clean, torch.Generator().manual_seed(1))
    assert float(loss.abs().max()) < 1e-4  # no row of this seed is at step 0, whose term is a likelihood


def test_a_network_without_a_variance_is_refused_where_one_is_learned():
    with pytest.raises(ValueError, match="8 channels for 4, not 4.*learn_sigma"):
        DDPM(learned_variance=True).training_loss(lambda x, time: x, latents(), torch.Generator())


def test_a_variance_that_no_law_asked_for_is_ignored():
    plain, both = (
        DDPM().training_loss(lambda x, time, k=k: torch.cat([x] * k, 1), latents(), torch.Generator().manual_seed(0))
        for k in (1, 2)
    )
    assert torch.equal(plain, both)


def test_a_law_is_named_by_its_kind():
    adapter = TypeAdapter(Law)
    assert adapter.validate_python({"kind": "flow", "time_law": "uniform"}) == RectifiedFlow(time_law="uniform")
    assert adapter.validate_python({"kind": "ddpm", "prediction": "epsilon"}) == DDPM(prediction="epsilon")
    for wrong in ({"kind": "ddmp"}, {"kind": "flow", "prediction": "v"}, {"kind": "ddpm", "prediction": "x0"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_a_grid_falls_from_noise_to_clean_inside_the_law(law, num_steps):
    grid = law.grid(num_steps)
    assert grid.times.shape == (num_steps,)
    assert grid.alphas.shape == grid.sigmas.shape == (num_steps + 1,)
    assert (grid.times.diff() < 0).all()
    assert (grid.sigmas.diff() < 0).all()
    assert 0 <= float(grid.times.min()) <= float(grid.times.max()) <= 1000
    assert float(grid.sigmas[0]) > 0.999
    assert (float(grid.alphas[-1]), float(grid.sigmas[-1])) == (1, 0)
    if law.kind == "ddpm":
        torch.testing.assert_close(grid.alphas.square() + grid.sigmas.square(), torch.ones_like(grid.alphas))
        steps, place = (grid.times * law.num_steps / 1000).floor().long(), grid.alphas[:-1].square()
        table = law.alphas_cumprod()
        assert (place <= table[steps] * (1 + 1e-9)).all()
        assert (place >= table[(steps + 1).clamp_max(law.num_steps - 1)] * (1 - 1e-9)).all()
