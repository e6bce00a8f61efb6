"""Textual inversion: new tokens of the text encoders, whose embeddings alone are trained (arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from derm_pipeline.models.learned_embeddings import add_embeddings
from derm_pipeline.models.pretrained.base import Base


class LearnedRows(nn.Module):
    """A table of embeddings in which some rows are a parameter of their own; the others cannot move."""

    def __init__(self, table: nn.Embedding, ids: Mapping[str, tuple[int, ...]]) -> None:
        """The rows `ids` of the table, by token, start as they are there."""
        super().__init__()
        self.table = table
        self._ids = dict(ids)
        every = [row for own in ids.values() for row in own]
        self.rows = nn.Parameter(table.weight.detach()[every].float().clone())
        place = torch.full((table.num_embeddings,), -1, device=table.weight.device)
        place[every] = torch.arange(len(every), device=place.device)
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table's, in which the new rows stand still."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        place = self.place[ids]
        found = self.table(ids)
        return torch.where((place >= 0)[..., None], self.rows[place.clamp_min(0)].to(found.dtype), found)

    def learned(self) -> dict[str, Tensor]:
        """Copies of the rows (vectors, width) by token, float32 on the CPU."""
        parts = self.rows.detach().float().cpu().split([len(own) for own in self._ids.values()])
        return {token: part.clone() for token, part in zip(self._ids, parts, strict=True)}


def learn_tokens(base: Base, tokens: Sequence[str], initialiser: str, num_vectors: int) -> list[LearnedRows]:
    """Teach a base new tokens, and make their embeddings parameters.

    Args:
        base: With its text encoders.
        tokens: The new ones.
        initialiser: The word from whose embedding they start.
        num_vectors: Embeddings of each.

    Returns:
        The tokens of each text encoder.

    Raises:
        ValueError: a token that exists already or that texts cannot hold, or an initialiser that is not one token.
    """
    learned = []
    for tokenizer in base.tokenizers:
        words = [token for token in tokens if len(_known(tokenizer, token)) == 1]
        if words:  # a vocabulary may spell them otherwise: "skin</w>"
            raise ValueError(f"inversion.tokens: the base has {', '.join(words)} already; choose other tokens")
    for encoder, tokenizer in zip(base.text_encoders, base.tokenizers, strict=True):
        table = encoder.get_input_embeddings()
        start = table.weight.detach()[_one_token(tokenizer, initialiser)].float()
        fresh = {token: start.expand(num_vectors, -1) for token in tokens}
        ids = add_embeddings(tokenizer, encoder, fresh, where="inversion.tokens")
        rows = LearnedRows(encoder.get_input_embeddings().requires_grad_(requires_grad=False), ids)
        encoder.set_input_embeddings(rows)
        learned.append(rows)
    _check_found(base, tokens)
    return learned


def _known(tokenizer: Any, word: str) -> list[int]:
    """The tokens that a word is made of; none where the tokenizer does not know all of it."""
    ids: list[int] = tokenizer.encode(word, add_special_tokens=False)
    return [] if tokenizer.unk_token_id in ids else ids


def _one_token(tokenizer: Any, word: str) -> int:
    ids = _known(tokenizer, word)
    if len(ids) != 1:
        pieces = tokenizer.tokenize(word)
        raise ValueError(f"the initialiser {word!r} is no single token of the base, but {pieces}: take another word")
    return ids[0]


def _check_found(base: Base, tokens: Sequence[str]) -> None:
    """Refuse tokens that the family's tokenizer does not find in a text: one with capitals where texts have none."""
    ids = base.tokenise([f"a photo of a {token}" for token in tokens]).ids
    for tokenizer, own in zip(base.tokenizers, ids, strict=True):
        for token, row in zip(tokens, own.tolist(), strict=True):
            wanted = tokenizer.convert_tokens_to_ids(token)
            if wanted not in row:
                raise ValueError(f"inversion.tokens: {token!r} is not found in {base.family} texts; take lower case")
