"""What a recipe's generator is made of: its autoencoder, and what is told of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from derm_pipeline.records import AgeBand, Diagnosis, SkinType
from derm_pipeline.store import Artifact, Reference, Store, StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from derm_pipeline.generation import Cell
    from derm_pipeline.models.generator import Classes
    from derm_pipeline.recipes.model import Recipe


def autoencoder_of(store: Store, generator: Artifact) -> Reference:
    """The autoencoder whose latents the generator learnt: no other decodes what it draws.

    Raises:
        StoreError: its latents are no longer in the store.
    """
    return latents_of(store, generator).manifest.inputs["autoencoder"]


def latents_of(store: Store, generator: Artifact) -> Artifact:
    """The latents that the generator learnt.

    Raises:
        StoreError: they are no longer in the store.
    """
    latents = store.get(generator.manifest.inputs["latents"])
    if latents is None:
        raise StoreError(f"the latents of {generator.reference} are not in {store.root} any more: run the recipe again")
    return latents


def stage_settings(recipe: Recipe, stage: str) -> dict[str, object]:
    """What a recipe says of its autoencoder, generator or synthetic dataset, as their artifacts keep it.

    Files count by what they hold, not by where they lie: a pretrained autoencoder, a base, prompts.

    Raises:
        FileNotFoundError, ValueError: such files are not there, or cannot be used.
    """
    from derm_pipeline.generation import PromptSampling
    from derm_pipeline.models.pretrained_vae import PretrainedVaeConfig
    from derm_pipeline.training.fine_tuning_settings import FineTuning

    config = recipe.resolved_autoencoder() if stage == "autoencoder" else getattr(recipe, stage)
    if isinstance(config, PretrainedVaeConfig | PromptSampling):
        return {stage: config.identity()}
    said = config.model_dump(mode="json")
    return {stage: said | {"base": config.base.identity()} if isinstance(config, FineTuning) else said}


def labels_of(table: pa.Table, classes: Classes) -> dict[str, Tensor]:
    """The class indices (n,) of every row, by condition; the null class where it is not known."""
    import torch

    from derm_pipeline.models.generator import class_index

    return {
        name: torch.tensor([class_index(classes, name, value) for value in values_of(table, name)]) for name in classes
    }


def values_of(table: pa.Table, condition: str) -> list[str | int | None]:
    """What is known of every row (n,) of a condition; None where nothing is."""
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
