"""Texts to what a denoiser is told of them: tokens, then embeddings, as the published pipelines make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from derm_pipeline.models.conditions import POOLED, TEXT, TEXT_MASK
from derm_pipeline.models.pretrained.config import Family


@dataclass(frozen=True)
class Tokens:
    """Tokens of n texts for each text encoder, on the CPU."""

    ids: tuple[Tensor, ...]
    """int64 (n, s) for each encoder."""
    masks: tuple[Tensor, ...]
    """bool (n, s) for each encoder: True where a token is no padding."""
    num_cut: tuple[int, ...]
    """Of each text, how many tokens at its end did not fit; the most of all encoders."""

    def rows(self, start: int, stop: int) -> Tokens:
        """Those of some of the texts."""
        return Tokens(
            tuple(ids[start:stop] for ids in self.ids),
            tuple(mask[start:stop] for mask in self.masks),
            self.num_cut[start:stop],
        )


def tokenise(family: Family, tokenizers: Sequence[Any], texts: Sequence[str], max_tokens: int) -> Tokens:
    """Tokens of texts, padded and cut to `max_tokens`, start and end included.

    A learned token of several rows ("<x>", "<x>_1", ...) is written out, as diffusers does.
    """
    each = [_tokenise(family, tokenizer, texts, max_tokens) for tokenizer in tokenizers]
    cut = tuple(max(counts) for counts in zip(*(one[2] for one in each), strict=True))
    return Tokens(tuple(one[0] for one in each), tuple(one[1] for one in each), cut)


def _tokenise(
    family: Family, tokenizer: Any, texts: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor, list[int]]:
    if family == "pixart":  # what its pipeline does to a prompt without clean_caption
        texts = [text.lower().strip() for text in texts]
    texts = [_written_out(text, tokenizer) for text in texts]
    whole = tokenizer(list(texts), padding=False, truncation=False, verbose=False).input_ids
    fitted = tokenizer(
        list(texts), padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt", verbose=False
    )
    return fitted.input_ids, fitted.attention_mask.bool(), [max(0, len(ids) - max_tokens) for ids in whole]


def _written_out(text: str, tokenizer: Any) -> str:
    added = tokenizer.added_tokens_encoder
    for token in sorted({token for token in added if f"{token}_1" in added and token in text}, key=len, reverse=True):
        rows, further = [token], 1
        while f"{token}_{further}" in added:
            rows.append(f"{token}_{further}")
            further += 1
        text = text.replace(token, " ".join(rows))
    return text


def embed_tokens(family: Family, encoders: Sequence[Any], tokens: Tokens) -> dict[str, Tensor]:
    """What the denoiser is told of n texts, float32, with gradients to the encoders.

    Returns:
        "text" (n, s, e) and "text_mask" bool (n, s), all True but for PixArt; "pooled" (n, p) for SDXL.
    """
    device = next(encoders[0].parameters()).device
    ids = [part.to(device) for part in tokens.ids]
    masks = [part.to(device) for part in tokens.masks]
    if family == "pixart":
        text = encoders[0](ids[0], attention_mask=masks[0].long())[0]
        return {TEXT: text.float(), TEXT_MASK: masks[0]}
    everything = torch.ones_like(masks[0])
    if family == "sd":
        attends = masks[0].long() if getattr(encoders[0].config, "use_attention_mask", False) else None
        return {TEXT: encoders[0](ids[0], attention_mask=attends)[0].float(), TEXT_MASK: everything}
    outputs = [encoder(part, output_hidden_states=True) for encoder, part in zip(encoders, ids, strict=True)]
    text = torch.cat([output.hidden_states[-2] for output in outputs], dim=2)
    return {TEXT: text.float(), TEXT_MASK: everything, POOLED: outputs[1].text_embeds.float()}
