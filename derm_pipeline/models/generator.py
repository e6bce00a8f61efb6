"""A generator: the network that a recipe trains, with all that is needed to sample from it, as files.

`generator.json` (networks' shapes, law, latent statistics) beside `weights.safetensors` and `ema.safetensors`. Its
autoencoder is files, too: `autoencoder.json` with weights, or with a reference to a pretrained one. A pretrained
network is a reference, too: its folder holds weights only where all of them were trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, TypeAdapter
from torch import Tensor

from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from derm_pipeline.models.diffusion import Law
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.pretrained.adapted import Embed, put_denoiser, put_text
from derm_pipeline.models.pretrained.config import Part, PretrainedNetworkConfig
from derm_pipeline.models.pretrained.network import PretrainedNetwork, load_pretrained_network
from derm_pipeline.models.pretrained_vae import (
    PretrainedVae,
    PretrainedVaeConfig,
    PretrainedVaeReference,
    load_pretrained_vae,
    load_reference,
)
from derm_pipeline.models.runtime import load_weights, save_weights
from derm_pipeline.models.unet import UNet, UNetConfig
from derm_pipeline.records import SkinType
from derm_pipeline.store import replacing, write_json

if TYPE_CHECKING:
    from derm_pipeline.models.pretrained.base import Base

Classes = Mapping[str, tuple[str, ...]]
"""Every condition that a generator is told, and its classes in order; the null class follows them."""


def _kind_or(default: str) -> Discriminator:
    """Tells union members apart by `kind`; files of before there were several have none."""

    def kind_of(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)

    return Discriminator(kind_of)


NetworkConfig = Annotated[
    Annotated[DiTConfig, Tag("dit")]
    | Annotated[UNetConfig, Tag("unet")]
    | Annotated[PretrainedNetworkConfig, Tag("pretrained")],
    _kind_or("dit"),
]
"""Shape of a network, told apart by `kind`."""
Network = DiT | UNet | PretrainedNetwork
"""What a recipe trains."""
AutoencoderChoice = Annotated[
    Annotated[AutoencoderConfig, Tag("trained")] | Annotated[PretrainedVaeConfig, Tag("pretrained")],
    _kind_or("trained"),
]
"""Settings of an autoencoder, told apart by `kind`: trained here, or a pretrained one."""
AnyAutoencoder = Autoencoder | PretrainedVae
"""Whatever makes latents of images and images of latents."""

_SAVED_AUTOENCODER: TypeAdapter[AutoencoderConfig | PretrainedVaeReference] = TypeAdapter(
    Annotated[
        Annotated[AutoencoderConfig, Tag("trained")] | Annotated[PretrainedVaeReference, Tag("pretrained")],
        _kind_or("trained"),
    ]
)
_ADVERSARY = "adversary."
_TEXT: tuple[Part, ...] = ("text",)

SKIN_TYPES = tuple(str(skin_type.value) for skin_type in SkinType)


class GeneratorSpec(BaseModel):
    """What a generator is, apart from its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkConfig
    law: Law
    classes: dict[str, tuple[str, ...]]
    """Of each condition of the network; the diagnoses are those of the training set."""
    seen: tuple[tuple[tuple[str | None, ...], int], ...] = ()
    """What training images show: a value of each of `classes`, in order (None where it is not known), and how many
    images show just these. Empty in files of before it was kept."""
    latent_mean: tuple[float, ...]
    """Mean of each latent channel over the training set."""
    latent_std: tuple[float, ...]
    """Standard deviation of each latent channel over the training set."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.model_validate_json((folder / "generator.json").read_text())

    def save(self, folder: Path) -> None:
        # Not write_json, which sorts: the order of the conditions decides which tables the weights belong to.
        with replacing(folder / "generator.json") as aside:
            aside.write_text(json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")

    def whiten(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) to zero mean and unit variance in every channel."""
        return (latents - self._per_channel(self.latent_mean, latents)) / self._per_channel(self.latent_std, latents)

    def unwhiten(self, latents: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return latents * self._per_channel(self.latent_std, latents) + self._per_channel(self.latent_mean, latents)

    def num_images(self, values: Mapping[str, str | None]) -> int:
        """How many training images show all of these conditions' values; None is any value, known or not."""
        wanted = {list(self.classes).index(name): value for name, value in values.items() if value is not None}
        return sum(num for shown, num in self.seen if all(shown[place] == value for place, value in wanted.items()))

    def check_seen(self, condition: str, value: str | None) -> None:
        """Refuse a value of a condition that no training image has: its row of the table is as chance made it.

        Raises:
            ValueError: with the values that were seen.
        """
        if not self.seen or value is None or self.num_images({condition: value}):
            return
        known = [other for other in self.classes[condition] if self.num_images({condition: other})]
        raise ValueError(
            f"{condition} {value} was never seen: no training image has it, so the generator would draw chance; "
            f"ask for {', '.join(known)}"
        )

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


def build_network(
    config: DiTConfig | UNetConfig | PretrainedNetworkConfig, device: torch.device | None = None
) -> Network:
    """A network of this shape: a fresh one, or the pretrained one with its weights as they were published.

    Args:
        config: Its shape.
        device: Where to; the CPU by default. A pretrained one's weights are kept in what this device computes in.

    Raises:
        FileNotFoundError: it is a pretrained one that no longer lies where it was.
        ValueError: it is a pretrained one whose files have changed since.
    """
    if isinstance(config, PretrainedNetworkConfig):
        return load_pretrained_network(config, device)
    network = UNet(config) if isinstance(config, UNetConfig) else DiT(config)
    return network.to(device) if device else network


def load_network(folder: Path, device: torch.device, *, averaged: bool = True) -> tuple[GeneratorSpec, Network]:
    """The generator in this folder, ready to sample: its averaged weights where it has them."""
    spec = GeneratorSpec.load(folder)
    network = build_network(spec.network, device)
    if isinstance(network, PretrainedNetwork):
        network.load_null(folder)
        put_denoiser(folder, network.denoiser, averaged=averaged)
        return spec, network.to(device).eval()
    path = folder / ("ema.safetensors" if averaged and (folder / "ema.safetensors").exists() else "weights.safetensors")
    network.load_state_dict(load_weights(path))
    return spec, network.to(device).eval()


def load_text(folder: Path, device: torch.device | None = None) -> Base:
    """The text side of the base of the network in this folder, as it was trained with it.

    Raises:
        FileNotFoundError: the base no longer lies where it was.
        ValueError: its files have changed since, or the network is told no texts by a base.
    """
    from derm_pipeline.models.pretrained.base import load_base_of

    config = GeneratorSpec.load(folder).network
    if not isinstance(config, PretrainedNetworkConfig):
        raise ValueError(f"the generator in {folder} is no pretrained one: no base makes embeddings of its texts")
    parts: tuple[Part, ...] = ("text",)
    base = load_base_of(config.base, device, parts=parts)
    put_text(folder, base.text_encoders, base.tokenizers)
    return base


def load_embedder(folder: Path, device: torch.device | None = None) -> Embed:
    """What the network in this folder is told of texts; see `load_text` for what it raises."""
    return load_text(folder, device).embed


def save_autoencoder(model: AnyAutoencoder, folder: Path) -> None:
    """Write `autoencoder.json` and, of one that was trained here, `weights.safetensors`; without its adversary.

    Of a pretrained one only the reference is written: where it lies, and the digests of its files.
    """
    write_json(folder / "autoencoder.json", model.config.model_dump(mode="json"))
    if isinstance(model, Autoencoder):
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_ADVERSARY)}
        save_weights(folder / "weights.safetensors", state)


def load_autoencoder(folder: Path, device: torch.device) -> AnyAutoencoder:
    """The autoencoder that `save_autoencoder` wrote, ready to encode and decode.

    Raises:
        FileNotFoundError: it is a pretrained one that no longer lies where it was.
        ValueError: it is a pretrained one whose files have changed since.
    """
    config = _SAVED_AUTOENCODER.validate_json((folder / "autoencoder.json").read_text())
    if isinstance(config, PretrainedVaeReference):
        return load_reference(config, device)
    model = Autoencoder(config)
    model.adversary = None
    model.load_state_dict(load_weights(folder / "weights.safetensors"))
    return model.to(device).eval()


def obtain_autoencoder(config: AutoencoderConfig | PretrainedVaeConfig, device: torch.device) -> AnyAutoencoder:
    """A fresh autoencoder to be trained, or the pretrained one, on this device."""
    if isinstance(config, PretrainedVaeConfig):
        return load_pretrained_vae(config, device)
    return Autoencoder(config).to(device)
