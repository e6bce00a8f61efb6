"""Whether a training fits into memory, tried on made-up examples: before any image is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from derm_pipeline.latents import Embeddings
from derm_pipeline.models.autoencoder import Autoencoder
from derm_pipeline.models.conditions import TEXT, TEXT_MASK, condition_classes
from derm_pipeline.models.generator import GeneratorSpec, build_network
from derm_pipeline.models.runtime import join_processes
from derm_pipeline.records import Diagnosis
from derm_pipeline.training.config import TrainingConfig
from derm_pipeline.training.draws import Objective
from derm_pipeline.training.objectives import AutoencoderObjective, GeneratorObjective
from derm_pipeline.training.processes import Processes
from derm_pipeline.training.settings import AutoencoderTraining, GeneratorTraining
from derm_pipeline.training.steps import Steps


def rehearse_autoencoder(config: AutoencoderTraining, size_px: int) -> None:
    """Build the network and estimate its training as `train_autoencoder` does, on black images.

    Raises:
        ValueError: it does not fit into memory, with what to change.
    """
    with _without_a_trace():
        model = Autoencoder(config.network).to(join_processes().device)
        images = np.zeros((1, size_px, size_px, 3), np.uint8)
        _rehearse(model, AutoencoderObjective(model, images, config.training.batch_size), config.training)


def rehearse_generator(config: GeneratorTraining, latent_size: int, channels: int, text_width: int = 0) -> None:
    """Build the network and estimate its training as `train_generator` does, on empty latents (channels, h, w).

    Where text is told, its embeddings are empty too, of `text_width` features a token.

    Raises:
        ValueError: it does not fit into memory, with what to change.
    """
    classes = condition_classes(config.conditions, tuple(Diagnosis))
    labels = {name: torch.tensor([len(known)]) for name, known in classes.items()} | {"diagnosis": torch.tensor([0])}
    text = None
    if config.text is not None:
        text = _empty_text(config.text.encoder.max_tokens, text_width)
        labels[TEXT] = torch.tensor([0])
    num_classes = {name: len(known) for name, known in classes.items()}
    spec = GeneratorSpec(
        network=config.network(latent_size, channels, num_classes, text_width=text_width),
        law=config.law,
        classes=classes,
        latent_mean=(0.0,) * channels,
        latent_std=(1.0,) * channels,
    )
    moments = torch.zeros((1, 1, 2 * channels, latent_size, latent_size), dtype=torch.float16)
    with _without_a_trace():
        model = build_network(spec.network).to(join_processes().device)
        _rehearse(model, GeneratorObjective(model, spec, moments, labels, config, text), config.training)


def _empty_text(num_tokens: int, width: int) -> Embeddings:
    """One text of so many tokens."""
    text, mask = torch.zeros(1, num_tokens, width, dtype=torch.float16), torch.ones(1, num_tokens, dtype=torch.bool)
    first = np.zeros(1, np.int64)
    return Embeddings([{TEXT: text, TEXT_MASK: mask}], first, first, [""], None)


def _rehearse(model: nn.Module, objective: Objective, config: TrainingConfig) -> None:
    with Processes(config) as processes:
        Steps(model, objective, None, config, processes)  # estimates, and refuses


@contextmanager
def _without_a_trace() -> Iterator[None]:
    """Torch's random streams and the device's memory as they were."""
    with torch.random.fork_rng():
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "training does not fit: not even a few examples do; take a smaller network or image, or a device with "
                "more memory"
            ) from error
        finally:
            torch.cuda.empty_cache()
