import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from derm_pipeline.models.diffusion import DDPM, Law, RectifiedFlow
from derm_pipeline.models.dit import DiT, preset
from derm_pipeline.models.laws import Draw

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


HYBRIDS = [
    *LAWS,
    DDPM(prediction="epsilon", learned_variance=True),
    DDPM(schedule="cosine", learned_variance=True, min_snr_gamma=5),
    DDPM(prediction="epsilon", learned_variance=True, num_steps=50, beta_end=0.2),
    DDPM(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
]


def reference_loss(law, clean: np.ndarray, noise: np.ndarray, sigma: np.ndarray, steps: np.ndarray, network):
    """The published loss of each row, in float64: `sigma` is a flow's time, `steps` are DDPM's."""
    column = (slice(None), None, None, None)
    if law.kind == "flow":
        noised = (1 - sigma[column]) * clean + sigma[column] * noise
        return ((network(noised, 1000 * sigma)[:, :4] - (noise - clean)) ** 2).mean((1, 2, 3))
    if law.schedule == "linear":
        betas = np.linspace(law.beta_start, law.beta_end, law.num_steps)
    elif law.schedule == "scaled_linear":
        betas = np.linspace(law.beta_start**0.5, law.beta_end**0.5, law.num_steps) ** 2
    else:
        curve = np.cos((np.arange(law.num_steps + 1) / law.num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    kept = np.cumprod(1 - betas)
    alpha, sigma = np.sqrt(kept[steps])[column], np.sqrt(1 - kept[steps])[column]
    noised = alpha * clean + sigma * noise
    output = network(noised, steps * 1000 / law.num_steps)
    prediction, target = output[:, :4], noise if law.prediction == "epsilon" else alpha * noise - sigma * clean
    weight = np.ones(len(clean))
    if law.min_snr_gamma is not None:
        ratio = kept[steps] / (1 - kept[steps])
        weight = np.minimum(ratio, law.min_snr_gamma) / (ratio + (law.prediction == "v"))
    loss = weight * ((prediction - target) ** 2).mean((1, 2, 3))
    if not law.learned_variance:
        return loss
    guess = (
        (noised - sigma * prediction) / alpha if law.prediction == "epsilon" else alpha * noised - sigma * prediction
    )
    for row, step in enumerate(steps):
        before = kept[step - 1] if step else 1.0
        first = np.sqrt(before) * betas[step] / (1 - kept[step])
        second = np.sqrt(1 - betas[step]) * (1 - before) / (1 - kept[step])
        place = max(step, 1)  # the first step borrows the second's variance
        variance = betas[place] * (1 - kept[place - 1]) / (1 - kept[place])
        part = (output[row, 4:] + 1) / 2
        model = torch.distributions.Normal(
            torch.from_numpy(first * guess[row] + second * noised[row]),
            torch.from_numpy(np.exp((part * np.log(betas[step]) + (1 - part) * np.log(variance)) / 2)),
        )
        if step:
            mean = torch.from_numpy(first * clean[row] + second * noised[row])
            bits = torch.distributions.kl_divergence(torch.distributions.Normal(mean, math.sqrt(variance)), model)
        else:
            x0 = torch.from_numpy(clean[row])
            upper = torch.where(x0 > 0.999, 1.0, model.cdf(x0 + 1 / 255))
            lower = torch.where(x0 < -0.999, 0.0, model.cdf(x0 - 1 / 255))
            bits = -(upper - lower).clamp_min(1e-12).log()
        loss[row] += float(bits.mean()) / math.log(2)
    return loss


@pytest.mark.parametrize("law", HYBRIDS, ids=repr)
def test_the_loss_is_the_published_one(law):
    clean = latents(12).clamp(-3, 3)
    draw = law.draw(tuple(clean.shape), torch.Generator().manual_seed(8))
    if law.kind == "ddpm":  # both ends of the law, and what was drawn between
        steps = (draw.times * law.num_steps / 1000).round().long()
        steps[:3] = torch.tensor([0, 1, law.num_steps - 1])
        kept = law.alphas_cumprod()[steps][:, None, None, None]
        draw = Draw(law.times(steps.float()), kept.sqrt().float(), (1 - kept).sqrt().float(), draw.noise)
    weight = 0.5 * torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("oc,nchw->nohw", weight.to(x.dtype), x)
        return torch.tanh(mixed + torch.cos(time.to(x.dtype) / 300)[:, None, None, None])

    found = law.loss(network, clean, draw)
    expected = reference_loss(
        law,
        clean.double().numpy(),
        draw.noise.double().numpy(),
        draw.sigmas.flatten().double().numpy(),
        (draw.times.double() * getattr(law, "num_steps", 1) / 1000).round().long().numpy(),
        lambda x, time: network(torch.from_numpy(x), torch.from_numpy(np.asarray(time, dtype=np.float64))).numpy(),
    )
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=1e-5)


def test_the_loss_of_a_dit_s2_is_that_of_double_precision():
    torch.manual_seed(3)
    model = DiT(preset("S/2", latent_size=32, conditions={"diagnosis": 7}, learn_sigma=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
        told = {"diagnosis": torch.tensor([2, 7])}
        law, clean = DDPM(prediction="epsilon", learned_variance=True), torch.randn(2, 4, 32, 32)
        draw = law.draw(tuple(clean.shape), torch.Generator().manual_seed(1))
        found = law.loss(lambda x, time: model(x, time, told), clean, draw)
        model.double()
        expected = reference_loss(
            law,
            clean.double().numpy(),
            draw.noise.double().numpy(),
            draw.sigmas.flatten().double().numpy(),
            draw.times.long().numpy(),
            lambda x, time: model(torch.from_numpy(x), torch.from_numpy(time).double(), told).numpy(),
        )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_the_loss_of_000_is_that_of_the_noise():
    """Its steps count from 1; x_t and the mean square are those of DDPM."""
    law, clean = DDPM(prediction="epsilon"), latents(5)
    draw = law.draw(tuple(clean.shape), torch.Generator().manual_seed(6))
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[(draw.times.long() + 1) - 1][:, None, None, None]
    noised = product.sqrt() * clean + (1 - product).sqrt() * draw.noise
    expected = (torch.sin(noised) - draw.noise).square().mean((1, 2, 3))
    torch.testing.assert_close(law.loss(lambda x, time: torch.sin(x), clean, draw), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("law", HYBRIDS, ids=repr)
def test_a_draw_may_be_sliced_and_its_losses_are_those_of_the_whole(law):
    clean = latents(8)

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sin(x), torch.cos(x)], 1) * time[:, None, None, None] / 1000

    whole = law.training_loss(network, clean, torch.Generator().manual_seed(4))
    draw = law.draw(tuple(clean.shape), torch.Generator().manual_seed(4))
    assert [part.shape[0] for part in draw] == [8] * 4
    assert draw.alphas.shape == draw.sigmas.shape == (8, 1, 1, 1)
    assert draw.noise.shape == clean.shape
    parts = [
        law.loss(network, clean[rows], Draw(*(part[rows] for part in draw))) for rows in (slice(0, 3), slice(3, 8))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_times_are_drawn_before_the_noise():
    draw = RectifiedFlow(time_law="uniform").draw((5, 4, 2, 2), torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(draw.times, 1000 * torch.rand(5, generator=generator))
    assert torch.equal(draw.noise, torch.randn(5, 4, 2, 2, generator=generator))


@pytest.mark.parametrize("law", HYBRIDS, ids=repr)
def test_a_loss_reads_no_value_of_its_device(law):
    """The device is "meta", which has no values to read."""
    draw = Draw(*(part.to("meta") for part in law.draw((6, 4, 8, 8), torch.Generator().manual_seed(0))))
    loss = law.loss(lambda x, time: torch.cat([x, x], 1), torch.empty(6, 4, 8, 8, device="meta"), draw)
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (6,), torch.float32)


def test_a_validation_before_the_training_does_not_spoil_it():
    law = DDPM(learned_variance=True, beta_end=0.0199)  # one that no other test has used
    network = torch.nn.Conv2d(4, 8, 1)
    with torch.inference_mode():
        law.training_loss(lambda x, time: network(x), latents(), torch.Generator().manual_seed(0))
    law.training_loss(lambda x, time: network(x), latents(), torch.Generator().manual_seed(0)).sum().backward()
    assert network.weight.grad is not None
