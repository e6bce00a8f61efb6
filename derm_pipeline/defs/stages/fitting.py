"""Whether what a recipe's generator is made of fits together: rows, conditions, memory, autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from derm_pipeline.records import AgeBand, Diagnosis, SkinType
from derm_pipeline.store import Artifact, Reference, Store, StoreError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from derm_pipeline.generation import Cell
    from derm_pipeline.models.generator import Classes
    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.training.config import TrainingConfig

_FLOAT_BYTES = 4


def autoencoder_of(store: Store, generator: Artifact) -> Reference:
    """The autoencoder whose latents the generator learnt: no other decodes what it draws.

    Raises:
        StoreError: its latents are no longer in the store.
    """
    latents = store.get(generator.manifest.inputs["latents"])
    if latents is None:
        raise StoreError(f"the latents of {generator.reference} are not in {store.root} any more: run the recipe again")
    return latents.manifest.inputs["autoencoder"]


def check_fits(recipe: Recipe, rows: pa.Table) -> None:
    """Refuse, before any training, what could only fail or mislead after hours.

    Args:
        recipe: Whose settings.
        rows: Its training set.

    Raises:
        ValueError: a condition of which no image knows anything, or a batch or network that no memory here holds.
    """
    for name in recipe.generator.conditions:
        if all(value is None for value in _values(rows, name)):
            raise ValueError(
                f"recipe {recipe.name}: generator.conditions: no training image of {', '.join(recipe.sources)} tells "
                f"its {name}, so the generator could not learn it; leave {name} out"
            )
    _check_memory(recipe)


def _check_memory(recipe: Recipe) -> None:
    """By what is surely needed: weights with AdamW's two moments, gradients and averages, and a batch as drawn.

    `training.memory` estimates the rest, of a network that is there, when its training starts.
    """
    import torch

    from derm_pipeline.models.generator import build_network, obtain_autoencoder
    from derm_pipeline.models.pretrained_vae import PretrainedVaeConfig

    choice, size_px = recipe.autoencoder, recipe.latents.size_px
    downsampling, channels = 8, 4
    with torch.device("meta"):  # takes no memory
        if not isinstance(choice, PretrainedVaeConfig):
            downsampling, channels = choice.network.downsampling, choice.network.latent_channels
            weights = _num_weights(obtain_autoencoder(choice.network, torch.device("meta")))
            _check_training(recipe.name, "autoencoder", choice.training, weights, 3 * size_px**2)
        side = size_px // downsampling
        shape = recipe.generator.network(side, channels, dict.fromkeys(recipe.generator.conditions, 10))
        values = 2 * channels * side**2 * _FLOAT_BYTES  # the noise of the latents, and of the law
        weights = _num_weights(build_network(shape))
        _check_training(recipe.name, "generator", recipe.generator.training, weights, values)


def _check_training(recipe: str, stage: str, config: TrainingConfig, num_weights: int, example_bytes: int) -> None:
    import torch

    from derm_pipeline.models.runtime import free_bytes, pick_device

    states = num_weights * _FLOAT_BYTES * (4 + len(config.decays))
    batch = config.batch_size * example_bytes
    device = pick_device()
    for key, need, there, what in (
        ("network", states, free_bytes(device), "a smaller network or fewer averages (ema_decays)"),
        ("training.batch_size", batch, free_bytes(torch.device("cpu")), "a smaller batch_size"),
    ):
        if need > there:
            raise ValueError(
                f"recipe {recipe}: {stage}.{key}: at least {need / 1e9:,.1f} GB are needed and "
                f"{there / 1e9:,.1f} GB are free; take {what}"
            )


def _num_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def labels_of(table: pa.Table, classes: Classes) -> dict[str, Tensor]:
    """The class indices (n,) of every row, by condition; the null class where it is not known."""
    import torch

    from derm_pipeline.models.generator import class_index

    return {
        name: torch.tensor([class_index(classes, name, value) for value in _values(table, name)]) for name in classes
    }


def _values(table: pa.Table, condition: str) -> list[str | int | None]:
    """What is known of every row."""
    if condition != "age_band":
        found: list[str | int | None] = table[condition].to_pylist()
        return found
    ages = zip(table["age_years"].to_pylist(), table["age_range"].to_pylist(), strict=True)
    return [
        AgeBand.of(years) if years is not None else AgeBand.of_range(span) if span else None for years, span in ages
    ]


def train_counts(table: pa.Table) -> dict[Cell, int]:
    """How many training images each diagnosis and skin type has."""
    counts: dict[Cell, int] = {}
    for diagnosis, skin_type in zip(table["diagnosis"].to_pylist(), table["skin_type"].to_pylist(), strict=True):
        cell = (Diagnosis(diagnosis), SkinType(skin_type) if skin_type else None)
        counts[cell] = counts.get(cell, 0) + 1
    return counts
