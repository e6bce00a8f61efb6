"""The pretrained pipeline that a recipe starts from: its parts, loaded once, and shared by all who use it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from derm_pipeline.models.conditions import POOLED, TEXT
from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.pretrained.config import (
    PARTS,
    Family,
    Part,
    PretrainedConfig,
    PretrainedNetworkConfig,
    PretrainedReference,
)
from derm_pipeline.models.pretrained.files import INDEX, TEXT_FOLDERS, BaseFiles, find_base, law_of, read_json
from derm_pipeline.models.pretrained.parts import load_denoiser, load_text, pipeline_of
from derm_pipeline.models.pretrained.text import Tokens, embed_tokens, tokenise
from derm_pipeline.models.pretrained_vae import PretrainedVae, PretrainedVaeConfig, load_pretrained_vae
from derm_pipeline.models.runtime import computes_bf16

_SCALING_FACTOR = 0.18215
"""Of an AutoencoderKL whose config.json does not tell, as diffusers has it."""
_PIXART_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Base:
    """Parts of a pretrained pipeline; those that were not asked for raise a ValueError that says so.

    Weights are fixed, but for those of the parts that are to be trained; gradients pass through.
    """

    def __init__(
        self,
        files: BaseFiles,
        reference: PretrainedReference,
        *,
        denoiser: nn.Module | None,
        text: tuple[list[Any], list[Any]] | None,
        vae: PretrainedVae | None,
    ) -> None:
        self._files = files
        self._denoiser, self._text = denoiser, text
        self.reference = reference
        """What to keep of it."""
        self.family: Family = files.family
        """Which kind of pipeline it is."""
        self.law: DDPM = law_of(files.config("scheduler"), files.where)
        """What it was trained under."""
        self.vae = vae
        """Its autoencoder; None where it was not asked for."""

    @property
    def denoiser(self) -> Any:
        """Diffusers' own network."""
        if self._denoiser is None:
            raise ValueError(self._not_asked("denoiser"))
        return self._denoiser

    @property
    def text_encoders(self) -> list[Any]:
        """Transformers' own networks, in the order in which their embeddings are joined."""
        if self._text is None:
            raise ValueError(self._not_asked("text"))
        return self._text[0]

    @property
    def tokenizers(self) -> list[Any]:
        """Of the text encoders, in their order."""
        if self._text is None:
            raise ValueError(self._not_asked("text"))
        return self._text[1]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those that were loaded."""
        loaded = {"denoiser": self._denoiser, "text": self._text, "vae": self.vae}
        return tuple(part for part in PARTS if loaded[part] is not None)

    @property
    def latent_scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What its publishers subtract from each latent channel, and divide it by then; no weights are read."""
        said = self._files.config("vae")
        num, scale = said["latent_channels"], said.get("scaling_factor", _SCALING_FACTOR)
        mean = said.get("latents_mean") or [said.get("shift_factor") or 0.0] * num
        return tuple(mean), tuple(value / scale for value in said.get("latents_std") or [1.0] * num)

    @property
    def text_identity(self) -> dict[str, Any]:
        """What embeddings of its texts depend on, as JSON: those of another are not its own."""
        of_text = {"weights.safetensors", *(folder for both in TEXT_FOLDERS[self.family] for folder in both)}
        settings = self.reference.settings
        return {
            "files": {name: sha for name, sha in self.reference.files.items() if name.split("/")[0] in of_text},
            "max_tokens": settings.max_tokens,
            "dtype": settings.dtype,
        }

    @property
    def max_tokens(self) -> int:
        """Tokens of a text, start and end included."""
        return self.reference.settings.max_tokens or _most_tokens(self._files, self.tokenizers, self.text_encoders)

    def network_config(
        self, latent_size: int, told: Mapping[str, tuple[int, ...]] | None = None
    ) -> PretrainedNetworkConfig:
        """The shape of the denoiser, for latents of this side, for texts of `max_tokens`.

        `told` are the shapes of one text's embeddings, where the text encoders were not loaded.
        """
        vae = self._files.config("vae")
        if told is None:
            width = sum(encoder.config.hidden_size for encoder in self.text_encoders)
            pooled = (self.text_encoders[1].config.projection_dim,) if self.family == "sdxl" else ()
            told = {TEXT: (self.max_tokens, width), POOLED: pooled}
        return PretrainedNetworkConfig(
            base=self.reference,
            latent_size=latent_size,
            channels=vae["latent_channels"],
            downsampling=2 ** (len(vae["block_out_channels"]) - 1),
            text_tokens=told[TEXT][0],
            text_width=told[TEXT][1],
            pooled_width=told[POOLED][0] if told.get(POOLED) else None,
        )

    def tokenise(self, texts: Sequence[str]) -> Tokens:
        """Tokens of texts for every encoder, padded and cut to `max_tokens`; how many were cut is told."""
        return tokenise(self.family, self.tokenizers, texts, self.max_tokens)

    def embed_tokens(self, tokens: Tokens) -> dict[str, Tensor]:
        """What the denoiser is told of n texts, float32 on the device, with gradients to the text encoders.

        Returns:
            "text" (n, s, e); "text_mask" bool (n, s), all True but for PixArt; "pooled" (n, p) for SDXL.
        """
        return embed_tokens(self.family, self.text_encoders, tokens)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> dict[str, Tensor]:
        """As `embed_tokens`, of any number of texts, in batches and without gradients.

        Raises:
            ValueError: there is no text.
        """
        if not texts:
            raise ValueError("there is no text to embed")
        tokens = self.tokenise(texts)
        batches = [
            self.embed_tokens(tokens.rows(start, start + batch_size)) for start in range(0, len(texts), batch_size)
        ]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def null(self) -> dict[str, Tensor]:
        """What the pipeline tells its denoiser where nothing is told, one row: the empty text; zeros for most SDXL."""
        return self.null_of(self.embed([""]))

    def null_of(self, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`null`, given what the empty text is embedded as; with gradients where that has some."""
        told = dict(empty)
        if self.family == "sdxl" and read_json(self._files.root / INDEX).get("force_zeros_for_empty_prompt", True):
            told |= {name: torch.zeros_like(told[name]) for name in (TEXT, POOLED)}
        return told

    def pipeline(self) -> Any:
        """Diffusers' own pipeline of these very modules, with the base's scheduler, without a safety checker."""
        if self.vae is None:
            raise ValueError(self._not_asked("vae"))
        return pipeline_of(self._files, self.denoiser, self.text_encoders, self.tokenizers, self.vae.network)

    def _not_asked(self, part: Part) -> str:
        return f"the {part} of {self._files.where} was not loaded: ask load_base for it"


def load_base(
    config: PretrainedConfig,
    device: torch.device | None = None,
    *,
    parts: Collection[Part] = PARTS,
    trained: Collection[Part] = (),
    expected: Mapping[str, str] | None = None,
) -> Base:
    """Load parts of a base.

    Args:
        config: Which base.
        device: Where to; the CPU by default.
        parts: What is needed of it: "denoiser", "text", "vae".
        trained: Parts of which all weights are to be trained: they stay float32 and take gradients. Those that take
            adapters are not among them.
        expected: sha256 of each file, as `PretrainedReference.files`, where it must be the base found before; those
            of the parts that are loaded are compared.

    Raises:
        FileNotFoundError: it is not there, or a part is missing; the message says where it was looked for.
        ValueError: it is another family than asked for, cannot be used, or is not the expected one.
    """
    device = device or torch.device("cpu")
    files = find_base(config)
    digests = files.digests(None if expected is None else parts)
    if expected is not None:
        _check_same(digests, expected, files.where)
        digests = dict(expected)
    dtype = _dtype(config, device)
    types = {part: torch.float32 if part in trained else dtype for part in PARTS}
    denoiser = load_denoiser(files, types["denoiser"]) if "denoiser" in parts else None
    text = load_text(files, types["text"]) if "text" in parts else None
    vae = load_pretrained_vae(_vae_config(config, files), device) if "vae" in parts else None
    for part, modules in (("denoiser", [denoiser] if denoiser else []), ("text", text[0] if text else [])):
        for module in modules:
            module.to(device).eval().requires_grad_(requires_grad=part in trained)
    if config.max_tokens is not None and text is not None:
        _check_max_tokens(config.max_tokens, files, *text)
    reference = PretrainedReference(settings=_settled(config, files), family=files.family, files=digests)
    return Base(files, reference, denoiser=denoiser, text=text, vae=vae)


def load_base_of(
    reference: PretrainedReference,
    device: torch.device | None = None,
    *,
    parts: Collection[Part] = PARTS,
    trained: Collection[Part] = (),
) -> Base:
    """The very base of a reference; see `load_base`."""
    return load_base(reference.settings, device, parts=parts, trained=trained, expected=reference.files)


def vae_config(config: PretrainedConfig) -> PretrainedVaeConfig:
    """The settings of a base's own autoencoder; see `load_base` for what it raises."""
    return _vae_config(config, find_base(config))


def _vae_config(config: PretrainedConfig, files: BaseFiles) -> PretrainedVaeConfig:
    if files.single:  # which does not tell its scaling
        scale = files.config("vae").get("scaling_factor", 0.18215)
        return PretrainedVaeConfig(model=config.model, dtype=config.dtype, scaling_factor=scale)
    settings = config.model_dump(include={"model", "offline", "dtype"})
    return PretrainedVaeConfig(subfolder="vae", revision=files.commit or config.revision, **settings)


def _settled(config: PretrainedConfig, files: BaseFiles) -> PretrainedConfig:
    here = Path(config.model)
    found = {"model": str(here.resolve())} if here.exists() else {"revision": files.commit or config.revision}
    if files.single and (config.layout is None or Path(config.layout).is_dir()):
        found["layout"] = str(files.root)
    return config.model_copy(update={**found, "family": files.family})


def _check_same(found: Mapping[str, str], expected: Mapping[str, str], where: str) -> None:
    changed = sorted(name for name, digest in found.items() if expected.get(name) != digest)
    if changed:
        raise ValueError(
            f"the base at {where} is not the one that was used before ({', '.join(changed)} differ): put the files "
            "back, or materialise what was made with it again"
        )


def _check_max_tokens(max_tokens: int, files: BaseFiles, encoders: list[Any], tokenizers: list[Any]) -> None:
    most = _most_tokens(files, tokenizers, encoders)
    if files.family != "pixart" and max_tokens > most:
        raise ValueError(f"max_tokens is {max_tokens}, and the text encoders of {files.where} take {most}")


def _most_tokens(files: BaseFiles, tokenizers: Sequence[Any], encoders: Sequence[Any]) -> int:
    if files.family == "pixart":  # T5 takes any number; this is what the pipeline takes
        return _PIXART_TOKENS.get(read_json(files.root / INDEX).get("_class_name", ""), 120)
    most = [tokenizer.model_max_length for tokenizer in tokenizers]
    return min(*most, *(encoder.config.max_position_embeddings for encoder in encoders))


def _dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return _DTYPES[config.dtype]
