"""Which pretrained pipeline a recipe starts from, and what is kept of it in place of a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Family = Literal["sd", "sdxl", "pixart"]
"""Which kind of pipeline: Stable Diffusion 1.x or 2.x; SDXL; PixArt-alpha or -sigma."""
Part = Literal["denoiser", "text", "vae"]
"""What can be loaded of a base by itself."""
PARTS: tuple[Part, ...] = get_args(Part)
TinyFamily = Literal["sd", "sd2", "sdxl", "pixart"]
"""What there is of tiny size: "sd2" is Stable Diffusion 2.x at 768 px, which predicts v."""
TINY_FAMILIES: tuple[TinyFamily, ...] = get_args(TinyFamily)
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class PretrainedConfig(BaseModel):
    """Which base, and how it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    """Hub id, folder in diffusers format (with model_index.json), or one .safetensors of a whole Stable Diffusion."""
    family: Family | None = None
    """Which kind of pipeline it must be; None is whichever its files say."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is its main branch."""
    offline: bool = False
    """Look in the local cache only."""
    dtype: Dtype = "auto"
    """Of the parts that are not trained; auto is bfloat16 where the device computes in it, else float32."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Tokens of a text, start and end included; what is longer is cut off. None is as many as the pipeline takes."""
    layout: str | None = Field(default=None, min_length=1)
    """For a single file: folder (or hub id) in diffusers format with the configs and tokenizers, which the file lacks;
    None is the folder of the file's own name beside it."""

    def identity(self) -> dict[str, Any]:
        """The settings on which results depend; files here count by what they hold, not by where they lie.

        Raises:
            FileNotFoundError: as `load_base`.
        """
        from derm_pipeline.models.pretrained.files import find_base
        from derm_pipeline.store import digest_of_json

        settings = self.model_dump(mode="json", exclude={"offline"})
        if Path(self.model).exists():
            settings["model"] = "files:" + digest_of_json(find_base(self).digests())[:16]
            settings["layout"] = None  # its files are counted among them
        return settings


class BaseVaeConfig(BaseModel):
    """The autoencoder of the base that the recipe's generator starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["base"] = "base"
    """The base's own."""
    dtype: Dtype | None = None
    """Of weights and arithmetic, where it is another than the base's."""


class PretrainedReference(BaseModel):
    """A base that was found: what is kept of it in place of a copy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pretrained"] = "pretrained"
    """Trained elsewhere."""
    settings: PretrainedConfig
    """Where it lies: a folder or file by its full path, a hub id with the commit that was found."""
    family: Family
    """Which kind of pipeline it is."""
    files: dict[str, str]
    """sha256 of its files, by path within it."""


class PretrainedNetworkConfig(BaseModel):
    """Shape of a pretrained denoiser, as the rest of the project asks for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pretrained"] = "pretrained"
    """Which network."""
    base: PretrainedReference
    """Whose denoiser it is."""
    latent_size: int = Field(ge=1)
    """Side of the square latents it is used at, in cells; it takes others, too."""
    channels: int = Field(default=4, ge=1)
    """Latent channels."""
    downsampling: int = Field(default=8, ge=1)
    """Pixels per latent cell, which it must know where it is told sizes."""
    text_tokens: int = Field(ge=1)
    """Tokens of a text."""
    text_width: int = Field(ge=1)
    """Features of a text token."""
    pooled_width: int | None = Field(default=None, ge=1)
    """Features of the whole text that it is told besides; None where it is not."""
    conditions: dict[str, int] = Field(default={}, max_length=0)
    """It is told text, and no classes."""

    @property
    def has_text(self) -> bool:
        """Whether it is told text: always."""
        return True
