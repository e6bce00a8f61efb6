"""What was trained of a base, as files in a generator's folder: written by training, put into a base again here.

`lora/denoiser.safetensors`, `lora/text_encoder.safetensors` (and `_2`): adapters. `learned_embeds.safetensors` (and
`_2`): new tokens. `weights.safetensors` and `ema.safetensors`: the whole denoiser. Any of them may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from derm_pipeline.models.learned_embeddings import add_embeddings, load_embeddings
from derm_pipeline.models.lora_files import load_lora
from derm_pipeline.models.lora_names import Part
from derm_pipeline.models.runtime import load_weights

WEIGHTS, AVERAGES = "weights.safetensors", "ema.safetensors"
LORA: dict[Part, str] = {
    "denoiser": "lora/denoiser.safetensors",
    "text_encoder": "lora/text_encoder.safetensors",
    "text_encoder_2": "lora/text_encoder_2.safetensors",
}
"""The file of each network's adapter."""
TEXT_ENCODERS: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
"""What a base's text encoders are called, in their order."""
EMBEDDINGS = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
"""The file of new tokens of each text encoder."""

Embed = Callable[[Sequence[str]], dict[str, Tensor]]
"""Texts to what a network is told of them; see `Base.embed`."""


def put_denoiser(folder: Path, denoiser: nn.Module, *, averaged: bool = True) -> None:
    """Put what a folder holds of a denoiser into a base's own: all its weights, then an adapter.

    Raises:
        ValueError: it is of another network.
    """
    there = [name for name in ((AVERAGES, WEIGHTS) if averaged else (WEIGHTS,)) if (folder / name).is_file()]
    if there:
        denoiser.load_state_dict(load_weights(folder / there[0]))
    if (folder / LORA["denoiser"]).is_file():
        load_lora(folder / LORA["denoiser"], denoiser)
    denoiser.eval().requires_grad_(requires_grad=False)


def put_text(folder: Path, encoders: Sequence[Any], tokenizers: Sequence[Any]) -> None:
    """Put what a folder holds of text encoders into a base's own: new tokens, then adapters.

    Raises:
        ValueError: it is of other networks, or a token exists already.
    """
    for encoder, tokenizer, name in zip(encoders, tokenizers, EMBEDDINGS, strict=False):
        if (folder / name).is_file():
            add_embeddings(tokenizer, encoder, load_embeddings(folder / name), where=str(folder / name))
    for encoder, part in zip(encoders, TEXT_ENCODERS, strict=False):
        if (folder / LORA[part]).is_file():
            load_lora(folder / LORA[part], encoder)
        encoder.eval().requires_grad_(requires_grad=False)


def is_text_adapted(folder: Path) -> bool:
    """Whether a text means something else to what a folder holds than to its base."""
    return any((folder / name).is_file() for name in (*EMBEDDINGS, *(LORA[part] for part in TEXT_ENCODERS)))


def trained_files(folder: Path, parts: Collection[str] = ("denoiser", "text")) -> list[str]:
    """Names of the files in a folder that hold what was trained of these parts."""
    of: Mapping[str, Sequence[str]] = {
        "denoiser": (WEIGHTS, AVERAGES, LORA["denoiser"]),
        "text": (*EMBEDDINGS, *(LORA[part] for part in TEXT_ENCODERS)),
    }
    return [name for part in parts for name in of[part] if (folder / name).is_file()]
