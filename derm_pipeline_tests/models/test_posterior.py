import math

import pytest
import torch

from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.posterior import interpolated_log_variance, posterior, respaced, variational_bits

LINEAR = DDPM().alphas_cumprod()


def test_the_posterior_variance_is_the_published_one():
    assert float(posterior(LINEAR).variance[1]) == pytest.approx(5.453187661e-05, rel=1e-8)


@pytest.mark.parametrize("retained", [range(1000), [0, 20, 41, 500, 979, 999]])
def test_the_posterior_is_the_product_of_two_gaussians(retained):
    kept = LINEAR[list(retained)]
    tables = posterior(kept)
    clean, noised = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    for place in (1, 2, len(kept) - 1):
        before, after = float(kept[place - 1]), float(kept[place])
        alpha = after / before  # x[k] = sqrt(alpha) x[k-1] + sqrt(1 - alpha) noise
        precision = 1 / (1 - before) + alpha / (1 - alpha)
        mean = (math.sqrt(before) * clean / (1 - before) + math.sqrt(alpha) * noised / (1 - alpha)) / precision
        assert float(tables.variance[place]) == pytest.approx(1 / precision, rel=1e-9)
        found = float(tables.mean_clean[place]) * clean + float(tables.mean_noised[place]) * noised
        assert found == pytest.approx(mean, rel=1e-8)
        assert float(tables.log_beta[place]) == pytest.approx(math.log(1 - alpha), rel=1e-9)


def test_the_first_step_goes_to_the_clean_image_and_borrows_the_second_steps_variance():
    tables = posterior(LINEAR)
    assert (float(tables.mean_clean[0]), float(tables.mean_noised[0]), float(tables.variance[0])) == (1, 0, 0)
    assert float(tables.log_variance[0]) == float(tables.log_variance[1]) == pytest.approx(math.log(5.453187661e-05))


@pytest.mark.parametrize(
    ("spacing", "count", "first", "last"),
    [
        ("250", 250, [0, 4, 8, 12, 16, 20], [979, 983, 987, 991, 995, 999]),
        ("50", 50, [0, 20, 41, 61, 82, 102], [938, 958, 979, 999]),
        ("ddim50", 50, [0, 20, 40], [940, 960, 980]),
        ("10,5", 15, [0, 55, 111], [750, 874, 999]),
        ("1000", 1000, [0, 1, 2], [997, 998, 999]),
        ("1", 1, [0], [0]),
    ],
)
def test_respacing_retains_the_steps_of_adm(spacing, count, first, last):
    retained = respaced(1000, spacing)
    assert len(retained) == count
    assert retained[: len(first)] == first
    assert retained[-len(last) :] == last


@pytest.mark.parametrize("kind", ["linspace", "trailing"])
@pytest.mark.parametrize("count", [1, 2, 20, 26, 50, 103, 999])
def test_respacing_as_diffusers_retains_the_steps_of_its_scheduler(kind, count):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(timestep_spacing=kind)
    scheduler.set_timesteps(count)
    theirs = [time for time in scheduler.timesteps.tolist() if time >= 0]  # some "trailing" have one -1 too many
    assert respaced(1000, f"{kind}{count}") == theirs[::-1]


@pytest.mark.parametrize("spacing", ["ddim999", "1001", "600,500", "0", "linspace0", "trailing1000"])
def test_a_spacing_that_does_not_exist_is_refused(spacing):
    with pytest.raises(ValueError, match="1000|500"):
        respaced(1000, spacing)


def test_the_learned_variance_lies_between_its_bounds():
    low, high = torch.tensor(-9.0), torch.tensor(-4.0)
    found = [float(interpolated_log_variance(torch.tensor(output), low, high)) for output in (-1.0, 0.0, 1.0)]
    assert found == [-9, -6.5, -4]


def test_variational_bits_are_the_divergence_or_the_likelihood():
    generator = torch.Generator().manual_seed(3)
    clean = 0.4 * torch.randn(2, 3, 4, 4, generator=generator)
    clean[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    true_mean, mean = (clean + 0.3 * torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    true_log_variance, log_variance = torch.full_like(mean, -3.0), torch.full_like(mean, -2.5)
    normal, true = (
        torch.distributions.Normal(mean, math.exp(-1.25)),
        torch.distributions.Normal(true_mean, math.exp(-1.5)),
    )
    divergence = torch.distributions.kl_divergence(true, normal).mean((1, 2, 3))
    upper = torch.where(clean > 0.999, 1.0, normal.cdf(clean + 1 / 255))
    lower = torch.where(clean < -0.999, 0.0, normal.cdf(clean - 1 / 255))
    likelihood = (upper - lower).log().mean((1, 2, 3))
    is_first = torch.tensor([True, False])
    bits = variational_bits(clean, true_mean, true_log_variance, mean, log_variance, is_first)
    torch.testing.assert_close(bits, torch.where(is_first, -likelihood, divergence) / math.log(2), rtol=1e-4, atol=1e-5)


def test_a_law_respaced_to_one_step_has_the_upper_bound_for_its_variance():
    tables = posterior(LINEAR[[999]])
    assert float(tables.log_variance[0]) == float(tables.log_beta[0]) == pytest.approx(math.log(1 - 4.03582977e-05))
    assert (float(tables.mean_clean[0]), float(tables.mean_noised[0])) == (1, 0)
