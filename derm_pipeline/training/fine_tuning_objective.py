"""What a pretrained generator is trained by: noised latents of rows drawn by diagnosis, told a text each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from derm_pipeline.latents import Moments
from derm_pipeline.models.conditions import TEXT, hide
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.guidance import Conditional
from derm_pipeline.models.laws import Draw
from derm_pipeline.training.draws import Batch
from derm_pipeline.training.fine_tuning_settings import FineTuning
from derm_pipeline.training.objectives import example_chances, latents_of
from derm_pipeline.training.told_texts import ToldTexts

_HIDDEN, _IS_PRIOR, _PRIOR = "hidden", "is_prior", "prior"


@dataclass(frozen=True)
class Examples:
    """Images and what may be told of each."""

    moments: Tensor | Moments
    """(n, orientations, 2 c, h, w), mean and log-variance."""
    diagnoses: Tensor
    """Class index (n,)."""
    texts: Tensor
    """(n, k): places of the texts that may be told of a row, of which one is drawn each time."""


@dataclass(frozen=True)
class Prior:
    """Samples of the base, for prior preservation."""

    latents: Tensor
    """(p, c, h, w), whitened, on the device."""
    texts: Tensor
    """(p,): places of the texts that they were drawn by, on the CPU."""
    weight: float


class FineTuningObjective:
    """The loss of the law on such rows; turn, noise, text and dropout of each are drawn from the step's stream."""

    def __init__(
        self,
        network: Conditional,
        spec: GeneratorSpec,
        examples: Examples,
        texts: ToldTexts,
        config: FineTuning,
        batch_size: int,
        device: torch.device,
        *,
        caption_dropout: float = 0.0,
        prior: Prior | None = None,
    ) -> None:
        self._network, self._law, self._config = network, spec.law, config
        self._examples, self._texts, self._prior = examples, texts, prior
        self._batch_size, self._caption_dropout = batch_size, caption_dropout
        there = examples.moments.to(device)
        self._resident = there if isinstance(there, Tensor) else None
        self._chances = example_chances(examples.diagnoses.cpu(), config.balance).cumsum(0)
        statistics = torch.tensor([spec.latent_mean, spec.latent_std], dtype=torch.float32)
        self._mean, self._std = statistics.view(2, 1, -1, 1, 1).to(device)

    def draw(self, step: int, stream: torch.Generator) -> Batch:
        size, moments = self._batch_size, self._examples.moments
        drawn = torch.rand(size, generator=stream, dtype=torch.float64)
        rows = torch.searchsorted(self._chances, drawn).clamp_max(len(self._chances) - 1)
        orientations = torch.randint(moments.shape[1], (size,), generator=stream)
        channels, *sides = moments.shape[2:]
        shape = (size, channels // 2, *sides)
        batch = {"rows": rows, "orientations": orientations, "latent_noise": torch.randn(shape, generator=stream)}
        if self._resident is None:  # they are fetched where they lie
            batch["moments"] = moments[rows, orientations]
        own = self._examples.texts
        texts = own[rows, torch.randint(own.shape[1], (size,), generator=stream)]
        if self._prior is not None:
            prior = torch.randint(len(self._prior.texts), (size,), generator=stream)
            is_prior = torch.arange(size) % 2 == 1
            texts = torch.where(is_prior, self._prior.texts[prior], texts)
            batch |= {_IS_PRIOR: is_prior, _PRIOR: prior}
        if self._caption_dropout:
            batch[_HIDDEN] = torch.rand(size, generator=stream) < self._caption_dropout
        batch |= self._texts.draw(texts) | self._noise(shape, stream)
        return batch

    def _noise(self, shape: tuple[int, ...], stream: torch.Generator) -> Batch:
        draw = self._law.draw(shape, stream)
        if self._config.noise_offset:
            offset = torch.randn((*shape[:2], 1, 1), generator=stream)
            draw = draw._replace(noise=draw.noise + self._config.noise_offset * offset)
        return draw._asdict()

    def loss(self, batch: Batch) -> Tensor:
        told = self.told(batch)
        if _HIDDEN in batch:
            told = hide(told, self._texts.null(len(batch["rows"])), {TEXT: batch[_HIDDEN]})
        draw = Draw(*(batch[name] for name in Draw._fields))
        losses = self._law.loss(lambda x, time: self._network(x, time, told), self.latents(batch), draw)
        if self._prior is None:
            return losses
        # of twice as many rows each half's mean: that of the images, and `weight` times that of the base's samples
        return losses * torch.where(batch[_IS_PRIOR], 2 * self._prior.weight, 2.0)

    def latents(self, batch: Batch) -> Tensor:
        """The clean latents (n, c, h, w) of these rows, float32, as the network has them."""
        resident = self._resident
        moments = batch["moments"] if resident is None else resident[batch["rows"], batch["orientations"]]
        latents = (latents_of(moments, batch["latent_noise"]) - self._mean) / self._std
        if self._prior is None:
            return latents
        return torch.where(batch[_IS_PRIOR][:, None, None, None], self._prior.latents[batch[_PRIOR]], latents)

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """What is told of these rows, nothing hidden."""
        return self._texts.told(batch)

    def null(self, num: int) -> Mapping[str, Tensor]:
        """What is told of nothing, as it is now."""
        return self._texts.null(num)
