"""A generator: the network that a recipe trains, with all that is needed to sample from it, as files.

`generator.json` (networks' shapes, law, latent statistics) beside `weights.safetensors` and `ema.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from derm_pipeline.models.diffusion import Law
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.runtime import load_weights, save_weights
from derm_pipeline.records import SkinType
from derm_pipeline.store import write_json

Classes = Mapping[str, tuple[str, ...]]
"""Every condition that a generator is told, and its classes in order; the null class follows them."""

SKIN_TYPES = tuple(str(skin_type.value) for skin_type in SkinType)


class GeneratorSpec(BaseModel):
    """What a generator is, apart from its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: DiTConfig
    law: Law
    classes: dict[str, tuple[str, ...]]
    """Of each condition of the network; the diagnoses are those of the training set."""
    latent_mean: tuple[float, ...]
    """Mean of each latent channel over the training set."""
    latent_std: tuple[float, ...]
    """Standard deviation of each latent channel over the training set."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.model_validate_json((folder / "generator.json").read_text())

    def save(self, folder: Path) -> None:
        write_json(folder / "generator.json", self.model_dump(mode="json"))

    def whiten(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) to zero mean and unit variance in every channel."""
        return (latents - self._per_channel(self.latent_mean, latents)) / self._per_channel(self.latent_std, latents)

    def unwhiten(self, latents: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return latents * self._per_channel(self.latent_std, latents) + self._per_channel(self.latent_mean, latents)

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=torch.float32).view(1, -1, 1, 1)


def class_index(classes: Classes, condition: str, value: str | int | None) -> int:
    """The class index of a condition's value; the null class for None.

    Raises:
        ValueError: an unknown value, with the known ones.
    """
    known = classes[condition]
    if value is None:
        return len(known)
    if str(value) not in known:
        raise ValueError(f"{condition} {value!r} is not one of {', '.join(known)}")
    return known.index(str(value))


def load_network(folder: Path, device: torch.device, *, averaged: bool = True) -> tuple[GeneratorSpec, DiT]:
    """The generator in this folder, ready to sample: its averaged weights where it has them."""
    spec = GeneratorSpec.load(folder)
    network = DiT(spec.network)
    path = folder / ("ema.safetensors" if averaged and (folder / "ema.safetensors").exists() else "weights.safetensors")
    network.load_state_dict(load_weights(path))
    return spec, network.to(device).eval()


def save_autoencoder(model: Autoencoder, folder: Path) -> None:
    """Write `autoencoder.json` and `weights.safetensors`."""
    write_json(folder / "autoencoder.json", model.config.model_dump(mode="json"))
    save_weights(folder / "weights.safetensors", model.state_dict())


def load_autoencoder(folder: Path, device: torch.device) -> Autoencoder:
    """The autoencoder that `save_autoencoder` wrote, ready to encode and decode."""
    model = Autoencoder(AutoencoderConfig.model_validate(json.loads((folder / "autoencoder.json").read_text())))
    model.load_state_dict(load_weights(folder / "weights.safetensors"))
    return model.to(device).eval()
