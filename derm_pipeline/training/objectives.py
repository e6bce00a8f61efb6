"""What is trained: an autoencoder on images, a generator on latents. The optimising itself is `loop.train`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from derm_pipeline.images import Pixels
from derm_pipeline.latents import latent_statistics, orient, to_model_range
from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig, autoencoder_loss
from derm_pipeline.models.diffusion import Law, RectifiedFlow
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.generator import Classes, GeneratorSpec
from derm_pipeline.models.runtime import autocast, pick_device
from derm_pipeline.training.loop import Trained, TrainingConfig, train

OnProgress = Callable[[int, int, float], None]


class AutoencoderTraining(BaseModel):
    """The autoencoder stage of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: AutoencoderConfig = AutoencoderConfig()
    """Shape and loss."""
    training: TrainingConfig
    """Budget and optimiser."""


class GeneratorTraining(BaseModel):
    """The generator stage of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch: int = Field(default=2, ge=1)
    """Side of the square of latent cells that becomes one token."""
    width: int = Field(default=192, ge=4)
    """Features of a token."""
    depth: int = Field(default=6, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=3, ge=1)
    """Attention heads."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    condition_init_std: float = Field(default=1.0, gt=0)
    """Spread of the initial condition embeddings; the reference's 0.02 learns classes too slowly in a short budget."""
    conditions: tuple[Literal["diagnosis", "skin_type"], ...] = ("diagnosis", "skin_type")
    """What the generator is told of an image."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Chance that an example's conditions are all hidden, so that guidance has an unconditional prediction."""
    balance: float = Field(default=1.0, ge=0, le=1)
    """How far the diagnoses are evened out: 0 draws examples as they come, 1 draws every diagnosis equally often."""
    law: Law = RectifiedFlow()
    """The noise law."""
    training: TrainingConfig
    """Budget and optimiser."""


def train_autoencoder(
    images: Pixels, config: AutoencoderTraining, *, work: Path, on_progress: OnProgress | None = None
) -> tuple[Autoencoder, Trained]:
    """Train on images (n, h, w, 3) uint8, in random orientations."""
    device = pick_device()
    torch.manual_seed(config.training.seed)
    model = Autoencoder(config.network).to(device)
    pixels = torch.from_numpy(images).to(device)

    def step_loss(step: int, stream: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pixels), (config.training.batch_size,), generator=stream)
        orientation = int(torch.randint(8, (1,), generator=stream))
        batch = orient(to_model_range(pixels[chosen.to(device)]), orientation)
        return autoencoder_loss(model, batch, stream)[0]

    return model, train(model, step_loss, config.training, work=work, on_progress=on_progress)


@torch.no_grad()
def reconstruct(model: Autoencoder, images: Tensor, *, batch_size: int = 128) -> Tensor:
    """Encode and decode images (n, 3, h, w) in [-1, +1], through the mean of their latents."""
    device = next(model.parameters()).device
    parts = []
    for batch in images.split(batch_size):
        with autocast(device):
            parts.append(model.decode(model.encode(batch.to(device))[0]).float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Mean peak signal-to-noise ratio over images (n, 3, h, w) in [-1, +1], in dB."""
    error = (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)
    return float((10 * torch.log10(4 / error)).mean())


def train_generator(
    moments: Tensor,
    labels: Mapping[str, Tensor],
    classes: Classes,
    config: GeneratorTraining,
    *,
    work: Path,
    on_progress: OnProgress | None = None,
) -> tuple[GeneratorSpec, DiT, Trained]:
    """Train a conditional generator on moments.

    Args:
        moments: (n, orientations, 2 c, h, w), mean and log-variance; kept on the device.
        labels: of the diagnosis and each of `config.conditions`, the class index (n,) of every row; the null class
            where unknown.
        classes: of each condition, in order.
        config: network, law, budget.
        work: folder of the checkpoint.
        on_progress: see `loop.train`.
    """
    device = pick_device()
    statistics = latent_statistics(moments)
    spec = GeneratorSpec(
        network=DiTConfig(
            latent_size=moments.shape[-1],
            channels=moments.shape[2] // 2,
            patch=config.patch,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            qk_norm=config.qk_norm,
            condition_init_std=config.condition_init_std,
            conditions={name: len(classes[name]) for name in config.conditions},
            learn_sigma=config.law.kind == "ddpm" and config.law.learned_variance,
        ),
        law=config.law,
        classes={name: classes[name] for name in config.conditions},
        latent_mean=tuple(statistics["mean"]),
        latent_std=tuple(statistics["std"]),
    )
    torch.manual_seed(config.training.seed)
    model = DiT(spec.network).to(device)
    moments = moments.to(device)
    chances = example_chances(labels["diagnosis"], config.balance).cumsum(0)
    told_labels = {name: labels[name].to(device) for name in config.conditions}
    size = config.training.batch_size

    def step_loss(step: int, stream: torch.Generator) -> Tensor:
        drawn = torch.rand(size, generator=stream, dtype=torch.float64)
        chosen = torch.searchsorted(chances, drawn).clamp_max(len(chances) - 1).to(device)
        orientation = torch.randint(moments.shape[1], (size,), generator=stream).to(device)
        latents = spec.whiten(draw_latents(moments[chosen, orientation], stream))
        hidden = (torch.rand(size, generator=stream) < config.condition_dropout).to(device)
        told = {
            name: torch.where(hidden, spec.network.conditions[name], told_labels[name][chosen])
            for name in config.conditions
        }
        return config.law.training_loss(lambda x, time: model(x, time, told), latents, stream).mean()

    trained = train(model, step_loss, config.training, work=work, on_progress=on_progress)
    return spec, model, trained


def draw_latents(moments: Tensor, stream: torch.Generator) -> Tensor:
    """Latents (n, c, h, w) drawn from moments (n, 2 c, h, w)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=stream).to(mean.device)
    return mean + noise * (0.5 * logvar).exp()


def example_chances(diagnoses: Tensor, balance: float) -> Tensor:
    """The chance (n,) of every example to be drawn: proportional to its diagnosis' count to the power -balance."""
    counts = torch.bincount(diagnoses).double()
    weights = counts[diagnoses] ** -balance
    return weights / weights.sum()
