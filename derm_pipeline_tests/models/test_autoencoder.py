import math

import numpy as np
import pytest
import torch

from derm_pipeline.models.autoencoder import (
    Adversary,
    Autoencoder,
    AutoencoderConfig,
    _frequency_distance,
    autoencoder_loss,
    autoencoder_losses,
)

TINY = AutoencoderConfig(width=16, num_blocks=1)


def images(n: int = 2, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("downsampling", "latent_channels"), [(4, 4), (8, 6), (16, 32)])
def test_images_become_moments_and_come_back_at_their_size(downsampling, latent_channels):
    config = TINY.model_copy(update={"downsampling": downsampling, "latent_channels": latent_channels})
    model = Autoencoder(config)
    mean, logvar = model.encode(images())
    assert mean.shape == logvar.shape == (2, latent_channels, 32 // downsampling, 48 // downsampling)
    assert model.decode(mean).shape == (2, 3, 32, 48)


def test_the_default_has_the_weights_that_were_measured():
    assert sum(parameter.numel() for parameter in Autoencoder(AutoencoderConfig()).parameters()) == 759_460


def test_an_image_that_does_not_divide_is_refused_with_its_size():
    with pytest.raises(ValueError, match="50 x 32 px.*8 px"):
        Autoencoder(TINY.model_copy(update={"downsampling": 8})).encode(images(width=50))


def test_the_log_variance_is_clamped():
    model = Autoencoder(TINY)
    with torch.no_grad():
        model.encoder[-1].weight.mul_(1e6)
    logvar = model.encode(images())[1].detach()
    assert float(logvar.min()) == -10
    assert float(logvar.max()) == 5


def test_the_loss_is_its_terms_weighted_and_the_terms_are_what_they_say():
    config = TINY.model_copy(update={"kl_weight": 0.3, "edge_weight": 0.7})
    model, batch = Autoencoder(config), images()
    loss, terms = autoencoder_loss(model, batch, torch.Generator().manual_seed(5))
    mean, logvar = model.encode(batch)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    rebuilt = model.decode(mean + noise * (0.5 * logvar).exp())
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(terms["kl"], divergence.mean())
    torch.testing.assert_close(terms["l1"], (rebuilt - batch).abs().mean())
    torch.testing.assert_close(terms["l2"], (rebuilt - batch).square().mean())
    edges = [(torch.diff(rebuilt, dim=dim) - torch.diff(batch, dim=dim)).abs().mean() for dim in (2, 3)]
    torch.testing.assert_close(terms["edge"], edges[0] + edges[1])
    assert float(terms["psnr_db"]) == pytest.approx(20 * math.log10(2 / math.sqrt(float(terms["l2"]))), abs=1e-4)
    expected = terms["l1"] + terms["l2"] + 0.7 * terms["edge"] + 0.3 * terms["kl"]
    torch.testing.assert_close(loss.detach(), expected)
    assert not any(term.requires_grad for term in terms.values())


def test_the_loss_draws_from_its_generator_only():
    model, batch = Autoencoder(TINY), images()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(losses))
        losses.append(float(autoencoder_loss(model, batch, torch.Generator().manual_seed(seed))[0].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_some_steps_make_the_reconstruction_better():
    torch.manual_seed(0)
    model, generator = Autoencoder(TINY), torch.Generator().manual_seed(0)
    batch = torch.nn.functional.interpolate(images(8, 4, 4), size=32, mode="bilinear")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    psnr_db = []
    for _ in range(60):
        loss, terms = autoencoder_loss(model, batch, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        psnr_db.append(float(terms["psnr_db"]))
    assert psnr_db[-1] > psnr_db[0] + 6


def test_the_state_is_plain_weights_that_load_into_a_fresh_model():
    first, second = Autoencoder(TINY), Autoencoder(TINY)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.encode(images())[0], first.encode(images())[0])
    assert set(first.state_dict()) == {name for name, _ in first.named_parameters()}


def noise_for(model: Autoencoder, n: int = 2) -> torch.Tensor:
    return torch.randn(model.encode(images(n))[0].shape, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("downsampling", [4, 8])
def test_the_weights_that_a_seed_starts_from_do_not_change(downsampling):
    """Recipes train the very same network as before: these sums were taken before there were 16 px a cell."""
    torch.manual_seed(3)
    model = Autoencoder(AutoencoderConfig(downsampling=downsampling, width=32))
    total = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    assert total == pytest.approx(FIRST_WEIGHTS[downsampling], rel=1e-9)


FIRST_WEIGHTS = {4: 2352.174684104521, 8: 6675.313378797074}


def test_a_latent_cell_sees_its_own_pixels_and_deeper_ones_are_wider():
    model = Autoencoder(TINY.model_copy(update={"downsampling": 16}))
    assert model.encoder[-1].in_channels == model.decoder[0].out_channels == 4 * TINY.width
    batch = images(1, 64, 64).requires_grad_()
    model.encode(batch)[0][0, 0, 1, 2].backward()
    seen = batch.grad.abs().sum((0, 1)) > 0
    assert seen[16:32, 32:48].all()


def test_losses_are_per_image_and_their_mean_is_the_loss():
    config = TINY.model_copy(update={"kl_weight": 0.3, "frequency_weight": 0.2, "adversarial_weight": 0.1})
    torch.manual_seed(2)
    model, batch = Autoencoder(config), images(3)
    noise = noise_for(model, 3)
    losses, terms = autoencoder_losses(model, batch, noise)
    assert losses.shape == (3,)
    assert {value.shape for value in terms.values()} == {(3,)}
    for row in range(3):
        alone, _ = autoencoder_losses(model, batch[row : row + 1], noise[row : row + 1])
        torch.testing.assert_close(losses[row : row + 1], alone)
    loss, means = autoencoder_loss(model, batch, torch.Generator().manual_seed(8))
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(means["frequency"], terms["frequency"].mean())


def test_the_frequency_term_is_the_distance_of_the_spectra():
    plain, model = Autoencoder(TINY), Autoencoder(TINY.model_copy(update={"frequency_weight": 0.4}))
    model.load_state_dict(plain.state_dict())
    batch, noise = images(), noise_for(plain)
    losses, terms = autoencoder_losses(model, batch, noise)
    mean, logvar = model.encode(batch)
    rebuilt = model.decode(mean + noise * (0.5 * logvar).exp()).detach().double().numpy()
    rows, columns = (2 * math.pi * np.outer(np.arange(size), np.arange(size)) / size for size in (32, 48))
    transforms = [np.exp(-1j * angles) / math.sqrt(len(angles)) for angles in (rows, columns)]  # the definition
    spectra = [
        np.log1p(np.abs(np.einsum("uy,ncyx,vx->ncuv", transforms[0], x, transforms[1]))[..., :25])
        for x in (rebuilt, batch.double().numpy())
    ]
    expected = np.abs(spectra[0] - spectra[1]).mean((1, 2, 3))
    np.testing.assert_allclose(terms["frequency"].numpy(), expected, rtol=1e-4)
    torch.testing.assert_close(losses - autoencoder_losses(plain, batch, noise)[0], 0.4 * terms["frequency"])


def test_the_frequency_term_does_not_mind_a_shift_and_minds_a_blur():
    batch = images(1, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(batch, 3, stride=1, padding=1)
    assert float(_frequency_distance(batch, batch.roll(5, 3))) < 1e-5 < 0.1 < float(_frequency_distance(batch, blurred))


def adversarial(weight: float = 0.5) -> Autoencoder:
    torch.manual_seed(4)
    return Autoencoder(TINY.model_copy(update={"adversarial_weight": weight}))


def gradients(model: Autoencoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_an_adversary_changes_no_other_initial_weight():
    torch.manual_seed(4)
    plain = Autoencoder(TINY).state_dict()
    state = adversarial().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    assert {name.split(".")[0] for name in state.keys() - plain.keys()} == {"adversary"}


def test_the_autoencoder_and_its_adversary_each_get_their_own_gradient():
    model, batch = adversarial(), images(2)
    noise = noise_for(model)
    both = gradients(model, autoencoder_losses(model, batch, noise)[0].sum())
    quiet = gradients(model, autoencoder_losses(model, batch, noise, adversarial_scale=0.0)[0].sum())
    plain = Autoencoder(TINY)
    plain.load_state_dict(model.state_dict(), strict=False)
    alone = gradients(plain, autoencoder_losses(plain, batch, noise)[0].sum())
    for name, gradient in alone.items():  # the adversary's own loss does not reach the autoencoder
        torch.testing.assert_close(quiet[name], gradient)
    assert not torch.allclose(both["decoder.0.weight"], alone["decoder.0.weight"])
    for name in both:
        if name.startswith("adversary."):  # nor does what the autoencoder lowers reach the adversary
            torch.testing.assert_close(both[name], quiet[name])


def test_the_scale_is_per_image():
    model, batch = adversarial(), images(2)
    noise = noise_for(model)
    scaled, terms = autoencoder_losses(model, batch, noise, adversarial_scale=torch.tensor([0.0, 1.0]))
    quiet, _ = autoencoder_losses(model, batch, noise, adversarial_scale=0.0)
    torch.testing.assert_close(scaled - quiet, torch.tensor([0.0, 0.5]) * terms["adversarial"])


def test_an_adversary_learns_to_tell_images_apart_and_is_resisted_by_what_looks_real():
    torch.manual_seed(5)
    adversary = Adversary()
    optimiser = torch.optim.AdamW(adversary.parameters(), lr=1e-3)
    sharp = images(4, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2)
    for _ in range(20):
        loss = adversary.loss(sharp, blurred).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(adversary.loss(sharp, blurred).detach().mean()) < 0.3
    assert float(adversary.loss(blurred, sharp).detach().mean()) > 1
    assert float(adversary.resistance(sharp).detach().mean()) < float(adversary.resistance(blurred).detach().mean())


def test_settings_of_before_there_were_kinds_still_load():
    old = {
        "downsampling": 4,
        "latent_channels": 4,
        "width": 96,
        "num_blocks": 2,
        "kl_weight": 0.001,
        "edge_weight": 0.5,
    }
    assert AutoencoderConfig.model_validate(old) == AutoencoderConfig(kl_weight=0.001)
    assert AutoencoderConfig().model_dump()["kind"] == "trained"
