"""The generator of a recipe that starts from a pretrained base: what it is given, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from derm_pipeline.defs.stages.fitting import labels_of
from derm_pipeline.defs.stages.sets import TOLD
from derm_pipeline.defs.stages.texts import embeddings_of
from derm_pipeline.defs.stages.watching import (
    decoder_of,
    event_folder,
    validation_moments,
    write_grid,
    write_stage_losses,
)
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import canonical
from derm_pipeline.store import Artifact, Build

if TYPE_CHECKING:
    from torch import Tensor

    from derm_pipeline.images import Pixels
    from derm_pipeline.latents import Moments
    from derm_pipeline.models.generator import GeneratorSpec
    from derm_pipeline.models.pretrained.adapted import Embed
    from derm_pipeline.models.pretrained.network import PretrainedNetwork
    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.training.fine_tuned import Captioned
    from derm_pipeline.training.fine_tuning import OnFineTuningSamples
    from derm_pipeline.training.fine_tuning_settings import FineTuning

OnStep = Callable[[int, int, float], None]


def make_fine_tuned(
    workspace: Workspace,
    recipe: Recipe,
    build: Build,
    latents: Artifact,
    table: pa.Table,
    watched: pa.Table,
    on_step: OnStep | None = None,
) -> None:
    """Train the recipe's base on the rows of the training set, and write what was trained.

    Args:
        workspace: Where everything lies.
        recipe: Whose generator.
        build: The artifact in the making.
        latents: Those of the rows; with embeddings of what they are told, where no stage changes what a text means.
        table: The training set.
        watched: The validation set.
        on_step: Called with (steps done, steps, loss), of all stages.
    """
    from derm_pipeline.latents import open_moments
    from derm_pipeline.models.conditions import condition_classes
    from derm_pipeline.training.fine_tuning import fine_tune
    from derm_pipeline.training.fine_tuning_settings import FineTuning
    from derm_pipeline.training.stopping import stop_on_signal

    config = recipe.generator
    assert isinstance(config, FineTuning)
    classes = condition_classes(("diagnosis",), canonical(table["diagnosis"].to_pylist()))
    held_out = validation_moments(latents, watched)
    with stop_on_signal() as stop_when:
        tuned = fine_tune(
            _captioned(table, open_moments(latents.directory)[1]),
            classes,
            config,
            work=build.work,
            text=embeddings_of(latents),
            held_out=None if held_out is None else _captioned(watched, held_out, classes["diagnosis"]),
            on_progress=on_step,
            on_samples=_grid_writer(build, config, table, latents, workspace),
            stop_when=stop_when,
            tensorboard=event_folder(workspace, recipe.name, "generator"),
        )
    tuned.save(build.directory)
    write_stage_losses(build, tuned, config, watched.num_rows)
    build.counts.update(
        num_weights=sum(stage.num_weights for stage in tuned.stages),
        num_captions_cut=next((stage.num_captions_cut for stage in tuned.stages if stage.num_captions_cut), 0),
        final_loss=round(float(np.mean(tuned.losses[-100:])), 4),
    )


def _captioned(table: pa.Table, moments: Tensor | Moments, diagnoses: tuple[str, ...] | None = None) -> Captioned:
    from derm_pipeline.training.fine_tuned import Captioned

    known = diagnoses or tuple(one.value for one in canonical(table["diagnosis"].to_pylist()))
    return Captioned(moments, labels_of(table, {"diagnosis": known})["diagnosis"], table[TOLD].to_pylist())


def _grid_writer(
    build: Build, config: FineTuning, table: pa.Table, latents: Artifact, workspace: Workspace
) -> OnFineTuningSamples | None:
    """A function that draws samples of training captions and keeps the picture; None where none is asked for."""
    grid = config.grid
    if grid is None:
        return None
    import torch

    from derm_pipeline.models.conditions import TEXT, condition_classes
    from derm_pipeline.training.grids import draw_grid, told_in_grid

    classes = condition_classes(("diagnosis", "skin_type"), canonical(table["diagnosis"].to_pylist()))
    labels = labels_of(table, classes) | {TEXT: torch.arange(table.num_rows)}
    captions = table[TOLD].take(pa.array(told_in_grid(labels, [TEXT], grid.num_each)[TEXT].tolist())).to_pylist()
    decoder = decoder_of(workspace, latents)

    def on_samples(step: int, network: PretrainedNetwork, spec: GeneratorSpec, embed: Embed) -> Pixels:
        picture = draw_grid(network, spec, decoder.decode, embed(captions), grid, config.training.precision)
        write_grid(build, step, picture)
        return picture

    return on_samples
