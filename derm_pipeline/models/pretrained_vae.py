"""A pretrained autoencoder by reference: any diffusers `AutoencoderKL`, from the hub, a folder or one file.

Stable Diffusion's (stabilityai/sd-vae-ft-ema, -mse) and SDXL's are such. Only safetensors are read. What is kept of one
is where it lies and the digests of its files, so that latents are never decoded by another one unnoticed. Its moments
are not scaled: `latent_mean` and `latent_std` tell what its publishers whiten by. diffusers is imported when one is
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from derm_pipeline.models.hub_files import check_same, check_subfolder
from derm_pipeline.models.runtime import computes_bf16
from derm_pipeline.models.vae_files import VaeFiles, find_files, read_network
from derm_pipeline.store import digest_of_file, digest_of_json


class PretrainedVaeConfig(BaseModel):
    """Which pretrained autoencoder, and how it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pretrained"] = "pretrained"
    """Trained elsewhere."""
    model: str = Field(default="stabilityai/sd-vae-ft-ema", min_length=1)
    """Hub id, folder with config.json and diffusion_pytorch_model.safetensors, or one .safetensors file."""
    subfolder: str | None = None
    """Folder inside the model: "vae" of a whole Stable Diffusion."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is its main branch."""
    offline: bool = False
    """Look in the local cache only."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of weights and arithmetic; auto is bfloat16 where the device computes in it, else float32."""
    force_upcast: bool | None = None
    """Whether float16 becomes float32, because values beyond 65,504 arise; None is as the model's config says."""
    scaling_factor: float | None = Field(default=None, gt=0)
    """Replaces the model's own; a single file without config.json has none."""

    @field_validator("subfolder")
    @classmethod
    def _stays_inside(cls, subfolder: str | None) -> str | None:
        return check_subfolder(subfolder)

    def identity(self) -> dict[str, Any]:
        """The settings on which the latents depend; files here count by what they hold, not by where they lie.

        Raises:
            FileNotFoundError: as `load_pretrained_vae`.
        """
        settings = self.model_dump(mode="json", exclude={"offline"})
        if Path(self.model).exists():
            settings["model"] = "files:" + digest_of_json(_digests(find_files(self)))[:16]
        return settings


class PretrainedVaeReference(BaseModel):
    """A pretrained autoencoder that was found: what is kept of it in place of a copy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pretrained"] = "pretrained"
    """Trained elsewhere."""
    settings: PretrainedVaeConfig
    """Where it lies: a folder or file by its full path, a hub id with the commit that was found."""
    files: dict[str, str]
    """sha256 of its files, by name: config.json and the weights."""
    downsampling: int
    """Pixels per latent cell, along each side."""
    latent_channels: int
    """Channels of a latent."""
    latent_mean: tuple[float, ...] | None
    """What its publishers subtract from each latent channel; None where its files do not tell."""
    latent_std: tuple[float, ...] | None
    """What they then divide it by: 1 / scaling_factor; None where its files do not tell."""


class PretrainedVae(nn.Module):
    """A diffusers `AutoencoderKL` with the interface of `Autoencoder`. Its weights are fixed; gradients pass through.

    The caller's autocast is without effect: the arithmetic is that of the configuration.
    """

    def __init__(self, network: nn.Module, config: PretrainedVaeReference, dtype: torch.dtype) -> None:
        super().__init__()
        for part in network.children():  # diffusers warns of a cast of the whole
            part.to(dtype)
        self.network: Any = network.requires_grad_(requires_grad=False)
        self.config = config
        self.dtype = dtype

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, h, w) in [-1, 1] to mean and log-variance, float32, each (n, c, h/f, w/f); not scaled.

        The log-variance is clamped to [-30, 20], as diffusers does.

        Raises:
            ValueError: h or w is not a multiple of the downsampling, or float16 was too small for the model's values.
        """
        height, width = images.shape[2:]
        if height % self.config.downsampling or width % self.config.downsampling:
            raise ValueError(
                f"images of {width} x {height} px do not divide into cells of {self.config.downsampling} px; "
                "choose an image size that is a multiple of it"
            )
        with torch.autocast(images.device.type, enabled=False):
            moments = self.network.encode(images.to(self.dtype)).latent_dist
        return self._sound(moments.mean), self._sound(moments.logvar)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w), not scaled, to images (n, 3, f h, f w), float32, in about [-1, 1]; clamp for pixels.

        Raises:
            ValueError: float16 was too small for the model's values.
        """
        with torch.autocast(latents.device.type, enabled=False):
            return self._sound(self.network.decode(latents.to(self.dtype)).sample)

    def _sound(self, values: Tensor) -> Tensor:
        # Only float16 overflows where the others do not, and asking makes the host wait for the device.
        if self.dtype == torch.float16 and not bool(values.isfinite().all()):
            raise ValueError(
                f"{self.config.settings.model} gives values that are not finite in float16 (SDXL's is known for it): "
                "set dtype: bfloat16 or float32, or force_upcast: true"
            )
        return values.float()


def load_pretrained_vae(
    config: PretrainedVaeConfig, device: torch.device | None = None, *, expected: Mapping[str, str] | None = None
) -> PretrainedVae:
    """The autoencoder of these settings, ready to encode and decode.

    Args:
        config: Which one.
        device: Where to; the CPU by default.
        expected: sha256 of each file, as `PretrainedVaeReference.files`, where it must be the one found before.

    Raises:
        FileNotFoundError: it is not there; the message says where it was looked for.
        ValueError: it is no `AutoencoderKL` of RGB images in safetensors, is incomplete, or is not the expected one.
    """
    device = device or torch.device("cpu")
    files = find_files(config)
    digests = _digests(files)
    if expected is not None:
        check_same(digests, expected, what="autoencoder", where=files.where, asset="autoencoder")
    network, has_scaling = read_network(files)
    reference = _reference(config, files, digests, network.config, has_scaling=has_scaling)
    dtype = _dtype(config, device, force_upcast=bool(network.config.force_upcast))
    model = PretrainedVae(network, reference, dtype).to(device).eval()
    if device.type == "cpu":
        _suit_processor(model)
    return model


def load_reference(reference: PretrainedVaeReference, device: torch.device | None = None) -> PretrainedVae:
    """The very autoencoder of a reference; see `load_pretrained_vae`."""
    return load_pretrained_vae(reference.settings, device, expected=reference.files)


def _suit_processor(model: PretrainedVae) -> None:
    """One image at a time, and colours innermost: the features of one of 256 px, 17 MB in bfloat16, fit its caches.

    So a row's values are also the same in every batch. Float32 stays in the order it is given in, for its rounding.
    """
    model.network.enable_slicing()
    if model.dtype == torch.bfloat16:
        model.network.to(memory_format=torch.channels_last)


def _digests(files: VaeFiles) -> dict[str, str]:
    return {path.name: digest_of_file(path) for path in (files.config, files.weights) if path is not None}


def _reference(
    config: PretrainedVaeConfig, files: VaeFiles, digests: dict[str, str], shape: Any, *, has_scaling: bool
) -> PretrainedVaeReference:
    here = Path(config.model)
    found = {"model": str(here.resolve())} if here.exists() else {"revision": files.commit or config.revision}
    scale = config.scaling_factor or (shape.scaling_factor if has_scaling else None)
    mean, std = None, None
    if scale is not None:
        num = shape.latent_channels
        mean = tuple(shape.latents_mean or [shape.shift_factor or 0.0] * num)
        std = tuple(value / scale for value in shape.latents_std or [1.0] * num)
    return PretrainedVaeReference(
        settings=config.model_copy(update=found),
        files=digests,
        downsampling=2 ** (len(shape.block_out_channels) - 1),
        latent_channels=shape.latent_channels,
        latent_mean=mean,
        latent_std=std,
    )


def _dtype(config: PretrainedVaeConfig, device: torch.device, *, force_upcast: bool) -> torch.dtype:
    upcasts = force_upcast if config.force_upcast is None else config.force_upcast
    if config.dtype == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if config.dtype == "float16" and upcasts:
        return torch.float32
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return dtypes[config.dtype]
