"""A pretrained text encoder by reference: CLIP's, T5's or any of BERT's kind, from the hub or a folder.

Models and tokenizers are transformers' own classes; only safetensors are read and no code of the model's is run. What
is kept of one is where it lies and the digests of its files, so that a generator is never told a text by another one
than it learnt with. transformers is imported when one is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from derm_pipeline.models.conditions import TEXT, TEXT_MASK
from derm_pipeline.models.hub_files import ModelFiles, check_same, check_subfolder
from derm_pipeline.models.runtime import computes_bf16
from derm_pipeline.models.text_files import find_text_files, read_shape, read_text_encoder
from derm_pipeline.store import digest_of_json

_BATCH = 64
"""Texts encoded at once on a GPU; always as many, so that a text's embedding does not depend on how many there are."""


class TextEncoderConfig(BaseModel):
    """Which text encoder, and how it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default="openai/clip-vit-large-patch14", min_length=1)
    """Hub id, or folder in transformers' format: config.json, safetensors and the tokenizer's files."""
    subfolder: str | None = None
    """Folder inside the model: "text_encoder" of a Stable Diffusion, whose tokenizer lies in "tokenizer"."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is its main branch."""
    offline: bool = False
    """Look in the local cache only."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of weights and arithmetic; auto is bfloat16 where the device computes in it, else float32."""
    max_tokens: int = Field(default=77, ge=2, le=4096)
    """Tokens of a text at most, its start and end included; what is longer is cut. CLIP takes 77, PixArt's T5 120."""

    @field_validator("subfolder")
    @classmethod
    def _stays_inside(cls, subfolder: str | None) -> str | None:
        return check_subfolder(subfolder)

    def identity(self) -> dict[str, Any]:
        """The settings on which embeddings depend; files here count by what they hold, not by where they lie.

        Raises:
            FileNotFoundError: as `load_text_encoder`.
        """
        settings = self.model_dump(mode="json", exclude={"offline"})
        if Path(self.model).exists():
            settings["model"] = "files:" + digest_of_json(find_text_files(self).digests())[:16]
        return settings


class TextEncoderReference(BaseModel):
    """A text encoder that was found: what is kept of it in place of a copy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: TextEncoderConfig
    """Where it lies: a folder by its full path, a hub id with the commit that was found."""
    files: dict[str, str]
    """sha256 of its files, by name."""
    width: int
    """Features of a token's embedding."""

    def identity(self) -> dict[str, Any]:
        """What embeddings follow from, wherever the files lie."""
        return {"files": self.files, **self.settings.model_dump(mode="json", include={"dtype", "max_tokens"})}


class TextEncoder:
    """Texts to embeddings. The weights are fixed."""

    def __init__(self, tokenizer: Any, network: Any, config: TextEncoderReference, device: torch.device) -> None:
        """Made by `load_text_encoder`."""
        self.config = config
        self._tokenizer, self._network, self._device = tokenizer, network, device
        self._batch_size = 1 if device.type == "cpu" else _BATCH

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text, start and end included, before it is cut to `max_tokens`."""
        return [len(ids) for ids in self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts to what a network is told: the last layer's states of their tokens.

        An embedding depends on its own text only, on the CPU to the last bit: there texts are encoded one at a time,
        without the padding that would cost as much as words do.

        Returns:
            On the CPU: "text", float32 (n, max_tokens, width), 0 where there is no token; "text_mask", bool
            (n, max_tokens), True where there is one.
        """
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        states = torch.zeros(len(places), self.config.settings.max_tokens, self.config.width)
        mask = torch.zeros(len(places), self.config.settings.max_tokens, dtype=torch.bool)
        for start, found, is_token in self._batches(list(places)):
            count, length = is_token.shape
            mask[start : start + count, :length] = is_token
            states[start : start + count, :length] = torch.where(is_token[..., None], found, 0)
        rows = torch.tensor([places[text] for text in texts], dtype=torch.int64)
        return {TEXT: states[rows], TEXT_MASK: mask[rows]}

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The place of the first text of a batch, states (k, t, width) and which are tokens (k, t), on the CPU."""
        size = self._batch_size
        for start in range(0, len(texts), size):
            batch = list(texts[start : start + size])
            count = len(batch)
            batch += [""] * (size - count)
            inputs = self._tokenizer(
                batch,
                truncation=True,
                max_length=self.config.settings.max_tokens,
                padding="max_length" if size > 1 else False,
                return_tensors="pt",
            )
            ids, is_token = inputs["input_ids"], inputs["attention_mask"].bool()
            if ids.shape[1] == 0:  # a tokenizer without marks of start and end gives an empty text no token
                continue
            states = self._network(
                input_ids=ids.to(self._device), attention_mask=is_token.to(self._device)
            ).last_hidden_state
            yield start, states[:count].float().cpu(), is_token[:count]


def load_text_encoder(
    config: TextEncoderConfig, device: torch.device | None = None, *, expected: Mapping[str, str] | None = None
) -> TextEncoder:
    """The text encoder of these settings.

    Args:
        config: Which one.
        device: Where to; the CPU by default.
        expected: sha256 of each file, as `TextEncoderReference.files`, where it must be the one found before.

    Raises:
        FileNotFoundError: it is not there; the message says where it was looked for.
        ValueError: it is no text encoder in safetensors, is incomplete, takes fewer tokens than `max_tokens`, or is not
            the expected one.
    """
    device = device or torch.device("cpu")
    files = find_text_files(config)
    digests = files.digests()
    if expected is not None:
        check_same(digests, expected, what="text encoder", where=files.where, asset="latents")
    tokenizer, network, width = read_text_encoder(config, files, _dtype(config, device))
    return TextEncoder(tokenizer, network.to(device), _reference(config, files, digests, width), device)


def load_text_reference(reference: TextEncoderReference, device: torch.device | None = None) -> TextEncoder:
    """The very text encoder of a reference; see `load_text_encoder`."""
    return load_text_encoder(reference.settings, device, expected=reference.files)


def text_width(config: TextEncoderConfig) -> int:
    """Features of a token's embedding, as the model's config.json tells; no weights are read.

    Raises:
        FileNotFoundError: as `load_text_encoder`.
        ValueError: it is no text encoder, or takes fewer tokens than `max_tokens`.
    """
    return read_shape(config, find_text_files(config))


def _reference(
    config: TextEncoderConfig, files: ModelFiles, digests: dict[str, str], width: int
) -> TextEncoderReference:
    here = Path(config.model)
    found = {"model": str(here.resolve())} if here.exists() else {"revision": files.commit or config.revision}
    return TextEncoderReference(settings=config.model_copy(update=found), files=digests, width=width)


def _dtype(config: TextEncoderConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
