"""What a network is told of its training texts: gathered from a cache, or embedded in the step by what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from derm_pipeline.latents.text_cache import EMPTY, Embeddings
from derm_pipeline.models.conditions import TEXT
from derm_pipeline.models.pretrained.base import Base
from derm_pipeline.models.pretrained.text import Tokens
from derm_pipeline.training.draws import Batch

_ROWS, _TOLD = "texts", "told."


class ToldTexts(Protocol):
    """Texts that are known beforehand, and what is told of them."""

    num_cut: int | None
    """Captions that are longer than is told; None where that is not known."""

    def rows(self, texts: Sequence[str]) -> Tensor:
        """The place (n,) of each text, on the CPU."""
        ...

    def draw(self, rows: Tensor) -> Batch:
        """What a batch needs to be told these texts (n,)."""
        ...

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """What is told of the texts of a batch on the device; with gradients where a text encoder is trained."""
        ...

    def null(self, num: int) -> dict[str, Tensor]:
        """What is told of nothing, for so many rows."""
        ...

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What is told of some of these texts, as it is now, without gradients."""
        ...


class CachedTexts:
    """Embeddings of a cache: resident on the device where they fit, else gathered for each batch. Nothing is called."""

    def __init__(
        self, embeddings: Embeddings, null: Mapping[str, Tensor], device: torch.device, num_cut: int | None = None
    ) -> None:
        """`null` is one row."""
        self.num_cut = num_cut
        self._embeddings, self._device = embeddings, device
        self._resident = embeddings.resident(device)
        self._null = {name: tensor.to(device) for name, tensor in null.items()}

    def rows(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(self._embeddings.rows_of(texts))

    def draw(self, rows: Tensor) -> Batch:
        if self._resident is not None:
            return {_ROWS: rows}
        return {f"{_TOLD}{name}": tensor for name, tensor in self._embeddings.gather(rows).items()}

    def told(self, batch: Batch) -> dict[str, Tensor]:
        if self._resident is not None:
            return {name: _single(tensor[batch[_ROWS]]) for name, tensor in self._resident.items()}
        told = {name: tensor for name, tensor in batch.items() if name.startswith(_TOLD)}
        return {name.removeprefix(_TOLD): _single(tensor) for name, tensor in told.items()}

    def null(self, num: int) -> dict[str, Tensor]:
        return {name: tensor.expand(num, *tensor.shape[1:]) for name, tensor in self._null.items()}

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = self._embeddings.gather(self._embeddings.rows_of(texts))
        return {name: _single(tensor).to(self._device) for name, tensor in found.items()}


class EncodedTexts:
    """Tokens of the texts, on the device, embedded in the step by the base's text encoders."""

    def __init__(self, base: Base, texts: Sequence[str], device: torch.device, num_cut: int | None = None) -> None:
        """Of these texts, and the empty one."""
        self.num_cut = num_cut
        distinct = list(dict.fromkeys([EMPTY, *texts]))
        tokens = base.tokenise(distinct)
        self._base, self._place = base, {text: place for place, text in enumerate(distinct)}
        self._ids = [ids.to(device) for ids in tokens.ids]
        self._masks = [mask.to(device) for mask in tokens.masks]
        null = base.null()
        self._fixed_null = None if bool(null[TEXT].any()) else null  # zeros, whatever is trained
        self._empty = torch.zeros(1, dtype=torch.int64, device=device)

    def rows(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self._place[text] for text in texts], dtype=torch.int64)

    def draw(self, rows: Tensor) -> Batch:
        return {_ROWS: rows}

    def told(self, batch: Batch) -> dict[str, Tensor]:
        return self._embedded(batch[_ROWS])

    def null(self, num: int) -> dict[str, Tensor]:
        null = self._fixed_null or self._base.null_of(self._embedded(self._empty))
        return {name: tensor.expand(num, *tensor.shape[1:]) for name, tensor in null.items()}

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self._base.embed(texts)

    def _embedded(self, rows: Tensor) -> dict[str, Tensor]:
        ids, masks = (tuple(table[rows] for table in tables) for tables in (self._ids, self._masks))
        return self._base.embed_tokens(Tokens(ids, masks, num_cut=(0,) * len(rows)))


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
