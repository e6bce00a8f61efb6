import math

import pytest
import torch

from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig, autoencoder_loss

TINY = AutoencoderConfig(width=16, num_blocks=1)


def images(n: int = 2, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("downsampling", "latent_channels"), [(4, 4), (8, 6)])
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
