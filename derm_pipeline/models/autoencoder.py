"""A small variational autoencoder that trains in a minute on one processor core.

Every convolution runs at a quarter of the image's side or less (PixelUnshuffle stem, as in DC-AE, arXiv 2410.10733):
convolutions at full resolution are what makes the usual autoencoders slow. It holds no randomness of its own.
An adversary can be trained along, inside the same model, so that one optimiser and one checkpoint hold both.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

_STEM = 4
_TAIL_WIDTH = 32
_LOGVAR_MIN, _LOGVAR_MAX = -10.0, 5.0
_ADVERSARY_WIDTH = 64


class AutoencoderConfig(BaseModel):
    """Shape and loss of an autoencoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["trained"] = "trained"
    """Trained here, on the recipe's own images."""
    downsampling: Literal[4, 8, 16] = 4
    """Pixels per latent cell, along each side."""
    latent_channels: int = Field(default=4, ge=1)
    """Channels of a latent."""
    width: int = Field(default=96, ge=8, multiple_of=8)
    """Features at a quarter of the image's side; twice as many at an eighth, four times at a sixteenth."""
    num_blocks: int = Field(default=2, ge=1)
    """Residual blocks at each resolution."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the KL divergence from the standard normal, per latent value."""
    edge_weight: float = Field(default=0.5, ge=0)
    """Weight of the L1 distance between the images' gradients, which keeps hairs and edges sharp."""
    frequency_weight: float = Field(default=0.0, ge=0)
    """Weight of the L1 distance between the log-magnitudes of the images' spectra, which keeps fine texture."""
    adversarial_weight: float = Field(default=0.0, ge=0)
    """Weight of fooling an adversary that is trained along (PatchGAN, hinge loss), which costs time in every step; 0 is
    without one."""
    adversarial_start: int = Field(default=1000, ge=0)
    """Steps before that term acts; the adversary learns from the first."""


class ResidualBlock(nn.Module):
    """Normalise and convolve twice, added to the input; the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]  # torch types a convolution's bias as optional

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class PixelTail(nn.Module):
    """Features (n, d, h/4, w/4) to images (n, 3, h, w): two pixel shuffles with a light residual step between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_half = nn.Conv2d(width, 48, 3, padding=1)
        self.refine = nn.Sequential(
            nn.Conv2d(12, _TAIL_WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(_TAIL_WIDTH, 12, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        half = F.pixel_shuffle(self.to_half(x), 2)  # (n, 12, h/2, w/2)
        return F.pixel_shuffle(half + self.refine(half), 2)


def _blocks(width: int, num: int) -> list[nn.Module]:
    return [ResidualBlock(width) for _ in range(num)]


class Adversary(nn.Module):
    """Whether each patch of an image looks real (PatchGAN, Isola et al. 2017, arXiv 1611.07004).

    Images (n, 3, h, w) to scores (n, 1, about h / 4, about w / 4), each of 34 x 34 px; normalised row by row, so that a
    row does not depend on its batch.
    """

    def __init__(self) -> None:
        super().__init__()
        width = _ADVERSARY_WIDTH
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, padding=1),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def loss(self, images: Tensor, rebuilt: Tensor) -> Tensor:
        """Its own hinge loss (n,) (Lim and Ye 2017, arXiv 1705.02894); nothing of it reaches the autoencoder."""
        real, fake = self(images).float(), self(rebuilt.detach()).float()
        return 0.5 * _row_mean(F.relu(1 - real) + F.relu(1 + fake))

    def resistance(self, rebuilt: Tensor) -> Tensor:
        """What the autoencoder lowers (n,): minus the scores of its images; the adversary's weights stand still."""
        frozen = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return -_row_mean(torch.func.functional_call(self, frozen, (rebuilt,)).float())


class Autoencoder(nn.Module):
    """Images to the moments of their latents and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width, num, channels = config.width, config.num_blocks, config.latent_channels
        encoder: list[nn.Module] = [
            nn.PixelUnshuffle(_STEM),
            nn.Conv2d(3 * _STEM**2, width, 3, padding=1),
            *_blocks(width, num),
        ]
        decoder: list[nn.Module] = [*_blocks(width, num), PixelTail(width)]
        deepest = width * config.downsampling // _STEM
        while width < deepest:
            encoder += [nn.PixelUnshuffle(2), nn.Conv2d(4 * width, 2 * width, 1), *_blocks(2 * width, num)]
            decoder = [*_blocks(2 * width, num), nn.Conv2d(2 * width, 4 * width, 1), nn.PixelShuffle(2), *decoder]
            width *= 2
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(deepest, 2 * channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(channels, deepest, 3, padding=1), *decoder)
        self.adversary = Adversary() if config.adversarial_weight else None
        """Of use in training only: it is not saved."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, h, w) in [-1, 1] to the moments of their latents: mean and log-variance, each (n, c, h/f, w/f).

        The log-variance is clamped to [-10, 5].

        Raises:
            ValueError: h or w is not a multiple of the downsampling.
        """
        height, width = images.shape[2:]
        if height % self.config.downsampling or width % self.config.downsampling:
            raise ValueError(
                f"images of {width} x {height} px do not divide into cells of {self.config.downsampling} px; "
                "choose an image size that is a multiple of it"
            )
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar.clamp(_LOGVAR_MIN, _LOGVAR_MAX)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) to images (n, 3, f h, f w) in about [-1, 1]; clamp before making pixels of them."""
        return self.decoder(latents)


def _row_mean(values: Tensor) -> Tensor:
    return values.mean((1, 2, 3))


def _edge_distance(a: Tensor, b: Tensor) -> Tensor:
    difference = a - b
    across = _row_mean((difference[..., :, 1:] - difference[..., :, :-1]).abs())
    down = _row_mean((difference[..., 1:, :] - difference[..., :-1, :]).abs())
    return across + down


def _frequency_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 between log(1 + magnitude) of the orthonormal spectra: blind to phase, so it wants texture, not pixels."""
    magnitude_a, magnitude_b = (torch.fft.rfft2(images, norm="ortho").abs().log1p() for images in (a, b))
    return _row_mean(F.l1_loss(magnitude_a, magnitude_b, reduction="none"))


def autoencoder_losses(
    model: Autoencoder, images: Tensor, noise: Tensor, *, adversarial_scale: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction and KL loss of each image of a batch (n, 3, h, w) in [-1, 1].

    L1 + L2 + `edge_weight` * L1 of the gradients + `kl_weight` * KL, each a mean over values (Kingma and Welling 2014,
    arXiv 1312.6114, with a gradient term in place of a perceptual network, so that no pretrained weights are needed),
    + `frequency_weight` * L1 of the spectra's log-magnitudes + `adversarial_weight` * what the adversary resists, where
    these are asked for. The adversary's own loss is part of the sum and reaches the adversary's weights only.

    Args:
        model: Called under the caller's autocast; the loss itself is float32.
        images: The batch.
        noise: Of the latents (n, c, h/f, w/f), standard normal; the only randomness.
        adversarial_scale: Factor (n,) or scalar of the adversarial term: 0 before step `adversarial_start`, then 1.

    Returns:
        The loss (n,) with gradient, and its terms (n,), detached.
    """
    mean, logvar = model.encode(images)
    rebuilt = model.decode(mean + noise * torch.exp(0.5 * logvar)).float()
    mean, logvar = mean.float(), logvar.float()
    config = model.config
    terms = {
        "l1": _row_mean(F.l1_loss(rebuilt, images, reduction="none")),
        "l2": _row_mean(F.mse_loss(rebuilt, images, reduction="none")),
        "edge": _edge_distance(rebuilt, images),
        "kl": 0.5 * _row_mean(mean.square() + logvar.exp() - 1 - logvar),
    }
    loss = terms["l1"] + terms["l2"] + config.edge_weight * terms["edge"] + config.kl_weight * terms["kl"]
    if config.frequency_weight:
        terms["frequency"] = _frequency_distance(rebuilt, images)
        loss = loss + config.frequency_weight * terms["frequency"]
    if model.adversary is not None:
        terms["adversarial"] = model.adversary.resistance(rebuilt)
        terms["adversary"] = model.adversary.loss(images, rebuilt)
        loss = loss + config.adversarial_weight * adversarial_scale * terms["adversarial"] + terms["adversary"]
    return loss, {name: value.detach() for name, value in terms.items()}


def autoencoder_loss(
    model: Autoencoder, images: Tensor, generator: torch.Generator, *, adversarial_scale: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of `autoencoder_losses`, with noise drawn on the generator's device.

    Returns:
        The loss (a scalar with gradient), and its terms and the PSNR in dB as detached scalars.
    """
    height, width = (side // model.config.downsampling for side in images.shape[2:])
    shape = (len(images), model.config.latent_channels, height, width)
    noise = torch.randn(shape, generator=generator, device=generator.device).to(images.device)
    losses, terms = autoencoder_losses(model, images, noise, adversarial_scale=adversarial_scale)
    means = {name: value.mean() for name, value in terms.items()}
    means["psnr_db"] = 10 * torch.log10(4 / means["l2"].clamp_min(1e-12))
    return losses.mean(), means
