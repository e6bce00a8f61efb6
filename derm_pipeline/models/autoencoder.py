"""A small variational autoencoder that trains in a minute on one processor core.

Every convolution runs at a quarter of the image's side or less (PixelUnshuffle stem, as in DC-AE, arXiv 2410.10733):
convolutions at full resolution are what makes the usual autoencoders slow. It holds no randomness of its own.
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


class AutoencoderConfig(BaseModel):
    """Shape and loss of an autoencoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    downsampling: Literal[4, 8] = 4
    """Pixels per latent cell, along each side."""
    latent_channels: int = Field(default=4, ge=1)
    """Channels of a latent."""
    width: int = Field(default=96, ge=8, multiple_of=8)
    """Features at a quarter of the image's side; twice as many at an eighth."""
    num_blocks: int = Field(default=2, ge=1)
    """Residual blocks at each resolution."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the KL divergence from the standard normal, per latent value."""
    edge_weight: float = Field(default=0.5, ge=0)
    """Weight of the L1 distance between the images' gradients, which keeps hairs and edges sharp."""


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
        if config.downsampling == 8:
            encoder += [nn.PixelUnshuffle(2), nn.Conv2d(4 * width, 2 * width, 1), *_blocks(2 * width, num)]
            decoder = [*_blocks(2 * width, num), nn.Conv2d(2 * width, 4 * width, 1), nn.PixelShuffle(2), *decoder]
        deepest = width * config.downsampling // _STEM
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(deepest, 2 * channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(channels, deepest, 3, padding=1), *decoder)

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


def _edge_distance(a: Tensor, b: Tensor) -> Tensor:
    difference = a - b
    across = (difference[..., :, 1:] - difference[..., :, :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return across + down


def autoencoder_loss(
    model: Autoencoder, images: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction and KL loss of a batch of images (n, 3, h, w) in [-1, 1].

    L1 + L2 + `edge_weight` * L1 of the gradients + `kl_weight` * KL, each a mean over values (Kingma and Welling 2014,
    arXiv 1312.6114, with a gradient term in place of a perceptual network, so that no pretrained weights are needed).

    Args:
        model: Called under the caller's autocast; the loss itself is float32.
        images: The batch.
        generator: The only randomness: the noise of the latents, drawn on the generator's device.

    Returns:
        The loss (a scalar with gradient), and its terms and the PSNR in dB as detached scalars.
    """
    mean, logvar = model.encode(images)
    noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
    rebuilt = model.decode(mean + noise * torch.exp(0.5 * logvar)).float()
    mean, logvar = mean.float(), logvar.float()
    l1, l2, edge = F.l1_loss(rebuilt, images), F.mse_loss(rebuilt, images), _edge_distance(rebuilt, images)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = l1 + l2 + model.config.edge_weight * edge + model.config.kl_weight * kl
    psnr_db = 10 * torch.log10(4 / l2.detach().clamp_min(1e-12))
    terms = {"l1": l1, "l2": l2, "edge": edge, "kl": kl, "psnr_db": psnr_db}
    return loss, {name: value.detach() for name, value in terms.items()}
