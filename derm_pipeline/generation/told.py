"""What a batch is told beside its seeds: embeddings of its texts, latents of the images that it begins from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from derm_pipeline.generation.origins import ReadOrigin, cells_of
from derm_pipeline.generation.plan import Manner
from derm_pipeline.latents import to_model_range
from derm_pipeline.models.diffusion import Start
from derm_pipeline.models.generator import AnyAutoencoder, GeneratorSpec

EmbedText = Callable[[list[str]], Mapping[str, Tensor]]
"""Texts -> what the network is told of them, tensors by condition with a row a text, on any device."""

_KEPT_TEXTS, _KEPT_ORIGINS = 256, 64

T = TypeVar("T")


class Kept(Generic[T]):
    """Values by name, made when they are first asked for; the latest are held.

    On the CPU each is made alone, so that its last bits depend on nothing else; otherwise those of a batch at once.
    """

    def __init__(self, make: Callable[[list[str]], list[T]], *, alone: bool, num_held: int) -> None:
        self._make, self._alone, self._num_held = make, alone, num_held
        self._held: dict[str, T] = {}
        self._lock = Lock()

    def of(self, names: Sequence[str]) -> list[T]:
        """The value of each name; of several threads one makes values at a time."""
        with self._lock:
            missing = [name for name in dict.fromkeys(names) if name not in self._held]
            for block in [[name] for name in missing] if self._alone else [missing] * bool(missing):
                self._held.update(zip(block, self._make(block), strict=True))
            values = [self._held[name] for name in names]
            for name in list(self._held)[: max(0, len(self._held) - self._num_held)]:
                del self._held[name]
            return values


class ToldTexts:
    """Embeddings of the texts of requests, as a network is told them."""

    def __init__(self, embed_text: EmbedText, *, alone: bool) -> None:
        def make(texts: list[str]) -> list[dict[str, Tensor]]:
            found = embed_text(texts)
            return [{name: tensor[row] for name, tensor in found.items()} for row in range(len(texts))]

        self._kept = Kept(make, alone=alone, num_held=_KEPT_TEXTS)

    def rows(self, texts: Sequence[str | None], null: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a network is told of these texts, with the rows of `null` where there is none; {} where all are none."""
        places = [place for place, text in enumerate(texts) if text is not None]
        found = self._kept.of([text for text in texts if text is not None])
        names = found[0] if found else ()
        told = {}
        for name in names:
            if name not in null or any(one[name].shape != null[name].shape[1:] for one in found):
                shapes = sorted({tuple(one[name].shape) for one in found})
                expected = tuple(null[name].shape[1:]) if name in null else "nothing of that name"
                raise ValueError(f"the embedding {name!r} of a text is {shapes}; the network is told {expected}")
            told[name] = null[name].clone()
            for place, one in zip(places, found, strict=True):
                told[name][place] = one[name].to(told[name])
        return told

    def digest_of(self, text: str) -> str:
        """A digest of one text's embedding: by it, embeddings of another encoder are told apart."""
        found = self._kept.of([text])[0]
        digest = hashlib.sha256()
        for name, tensor in sorted(found.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Origins:
    """Latents of the images that samples begin from, as the network learnt them, and the cells of them to be kept."""

    def __init__(
        self, read: ReadOrigin, autoencoder: AnyAutoencoder, spec: GeneratorSpec, device: torch.device
    ) -> None:
        def make(digests: list[str]) -> list[tuple[Tensor, Tensor]]:
            begun = [read(sha256) for sha256 in digests]
            images = to_model_range(torch.from_numpy(np.stack([one.pixels for one in begun]))).to(device)
            mean, _ = autoencoder.encode(images)
            latents = spec.whiten(mean.float())
            cells = torch.from_numpy(np.stack([cells_of(one, latents.shape[2]) for one in begun]))
            return list(zip(latents, cells[:, None].to(device), strict=True))

        self._kept = Kept(make, alone=device.type == "cpu", num_held=_KEPT_ORIGINS)

    def start(self, digests: Sequence[str], manner: Manner) -> Start:
        """Where samples of these images begin."""
        latents, cells = zip(*self._kept.of(digests), strict=True)
        keep = torch.stack(cells) if manner.keeps_lesion else None
        return Start(torch.stack(latents), 1.0 if manner.strength is None else manner.strength, keep)


def digest_of_origin(read: ReadOrigin, sha256: str) -> str:
    """A digest of the pixels that a sample begins from, and of the lesion that it keeps."""
    begun = read(sha256)
    digest = hashlib.sha256(f"{begun.pixels.shape} ".encode() + begun.pixels.tobytes())
    if begun.lesion is not None:
        digest.update(np.packbits(begun.lesion).tobytes())
    return digest.hexdigest()
