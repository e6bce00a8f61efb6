"""How near images come back from an autoencoder: PSNR and SSIM of every image, and whether that is good enough."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

_RANGE = 2.0  # of pixel values, from -1 to +1
_WINDOW, _WINDOW_STD = 11, 1.5
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
_ROWS_AT_ONCE = 32


class ReconstructionMinimum(BaseModel):
    """What the reconstruction must reach before latents are made of an autoencoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    psnr_db: float = Field(default=20.0, ge=0)
    """Least mean peak signal-to-noise ratio, in dB."""
    ssim: float = Field(default=0.5, ge=-1, le=1)
    """Least mean structural similarity; 1 is the image itself."""


@dataclass(frozen=True)
class Reconstruction:
    """Figures of every image, in order."""

    psnr_db: Tensor
    """(n,), in dB."""
    ssim: Tensor
    """(n,), from -1 to 1."""

    @property
    def means(self) -> dict[str, float]:
        """Both figures' means over the images."""
        return {"psnr_db": float(self.psnr_db.mean()), "ssim": float(self.ssim.mean())}


def measure_reconstruction(rebuilt: Tensor, images: Tensor) -> Reconstruction:
    """PSNR and SSIM of rebuilt images (n, 3, h, w) in [-1, +1] against the images themselves."""
    return Reconstruction(psnr_db_each(rebuilt, images), ssim_each(rebuilt, images))


def psnr_db_each(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (n,) of images (n, c, h, w) in [-1, +1], in dB; 106 dB where they are equal."""
    _check_shapes(a, b)
    error = (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)
    return 10 * torch.log10(_RANGE**2 / error)


def psnr_db(a: Tensor, b: Tensor) -> float:
    """The mean of `psnr_db_each`."""
    return float(psnr_db_each(a, b).mean())


def ssim_each(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (n,) of images (n, c, h, w) in [-1, +1], float32.

    Wang et al. 2004 (IEEE Transactions on Image Processing 13, 600-612): Gaussian window of 11 x 11 with deviation
    1.5, K1 = 0.01, K2 = 0.03, population moments, only windows that lie inside the image; mean over windows and
    channels.

    Raises:
        ValueError: the shapes differ, or an image is smaller than the window.
    """
    _check_shapes(a, b)
    if min(a.shape[2:]) < _WINDOW:
        raise ValueError(f"SSIM needs images of at least {_WINDOW} px a side, not {a.shape[3]} x {a.shape[2]}")
    pairs = zip(a.split(_ROWS_AT_ONCE), b.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([_ssim_rows(some.float(), others.float()) for some, others in pairs])


def ssim(a: Tensor, b: Tensor) -> float:
    """The mean of `ssim_each`."""
    return float(ssim_each(a, b).mean())


def reconstruction_problems(psnr_db: Tensor, ssim: Tensor, minimum: ReconstructionMinimum) -> list[str]:
    """What is wrong with a reconstruction, one sentence each; empty when latents may be made.

    Args:
        psnr_db: Of every image (n,), in dB.
        ssim: Of every image (n,).
        minimum: What their means must reach.
    """
    num = len(psnr_db)
    if not num:
        return ["no image was rebuilt, so the autoencoder was not tried"]
    num_broken = int((~(psnr_db.isfinite() & ssim.isfinite())).sum())
    if num_broken:
        return [f"{num_broken} of {num} images come back with values that are not finite"]
    problems = []
    for name, unit, values, least in (
        ("PSNR", " dB", psnr_db, minimum.psnr_db),
        ("SSIM", "", ssim, minimum.ssim),
    ):
        mean = float(values.double().mean())
        if mean < least:
            problems.append(
                f"the mean {name} of {num} rebuilt images is {mean:.4g}{unit}, below {least:g}{unit} (the worst image: "
                f"{float(values.min()):.4g}{unit}); train the autoencoder longer, give it more width or latent "
                "channels, or less downsampling"
            )
    return problems


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")


def _ssim_rows(a: Tensor, b: Tensor) -> Tensor:
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a, variance_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """Gaussian means over every window inside the images: (n, c, h, w) to (n, c, h - 10, w - 10)."""
    places = torch.arange(_WINDOW, device=images.device, dtype=images.dtype) - _WINDOW // 2
    weights = torch.exp(-0.5 * (places / _WINDOW_STD) ** 2)
    weights = weights / weights.sum()
    flat = images.flatten(0, 1)[:, None]  # every channel is an image of its own
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return flat.unflatten(0, images.shape[:2])[:, :, 0]
