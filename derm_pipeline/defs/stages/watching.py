"""What shows how a training goes: its loss on val images, samples on the way, TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from derm_pipeline.defs.stages.sets import VALIDATION_SET, squares
from derm_pipeline.images import Pixels, decode, encode_jpeg, read_bytes
from derm_pipeline.store import Artifact, Build, StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from derm_pipeline.defs.workspace import Workspace
    from derm_pipeline.latents import Embeddings, Moments
    from derm_pipeline.models.generator import AnyAutoencoder, GeneratorSpec, Network
    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.training.config import TrainingConfig
    from derm_pipeline.training.fine_tuned import FineTuned
    from derm_pipeline.training.fine_tuning_settings import FineTuning
    from derm_pipeline.training.loop import Trained
    from derm_pipeline.training.settings import GeneratorTraining

LOSSES = "losses.parquet"
VALIDATION = "validation"
"""Folder of the val images' moments within the latents."""
_GRIDS = "samples"
_GRID_QUALITY = 92

OnGrid = Callable[[int, "Network", "GeneratorSpec"], Pixels]


def event_folder(workspace: Workspace, name: str, asset: str) -> Path | None:
    """Where the event files of a training go, if anywhere."""
    return workspace.tensorboard / name / asset if workspace.tensorboard else None


def validation_images(workspace: Workspace, recipe: Recipe, held_out: Artifact) -> Pixels | None:
    """The validation set's images as the recipe sees them; None where it has none."""
    rows = held_out.table(VALIDATION_SET)
    return squares(workspace, recipe, rows) if rows.num_rows else None


def validation_moments(latents: Artifact, rows: pa.Table) -> Tensor | Moments | None:
    """The moments of the validation set's images; None where it has none.

    Raises:
        ValueError: the latents are those of other images.
    """
    if not rows.num_rows:
        return None
    from derm_pipeline.latents import open_moments

    digests, moments = open_moments(latents.path(VALIDATION))
    if digests != rows["sha256"].to_pylist():
        raise ValueError(f"{latents.reference} is not of the current validation set: materialise latents again")
    return moments


def write_losses(build: Build, trained: Trained | None, config: TrainingConfig | None, num_held_out: int) -> None:
    """Write the finished curve, and count what it is of; an empty one where nothing was trained."""
    from derm_pipeline.training.curve import LOSS_SCHEMA, images_per_s, loss_table

    if trained is None or config is None:
        build.write_table(LOSSES, LOSS_SCHEMA.empty_table())
        build.counts["num_steps"] = 0
        return
    build.write_table(LOSSES, loss_table(trained.losses, trained.validation, config))
    pace = images_per_s(build.work)
    build.counts.update(
        num_steps=len(trained.losses),
        resumed_from_step=trained.resumed_from_step,
        images_per_s=None if pace is None else round(pace, 1),
        num_validation_images=num_held_out,
        validation_loss=round(trained.validation[-1][1], 4) if trained.validation else None,
    )


def write_stage_losses(build: Build, tuned: FineTuned, config: FineTuning, num_held_out: int) -> None:
    """Write the curve of all stages, one after the other, and count what it is of."""
    from derm_pipeline.training.curve import images_per_s, loss_table

    tables, steps, images = [], 0, 0
    for stage, trained in zip(config.stages, tuned.stages, strict=True):
        table = loss_table(trained.losses, trained.validation, stage.training)
        for name, before in (("step", steps), ("num_images", images)):
            moved = pc.add(table[name], pa.scalar(before, table.schema.field(name).type))
            table = table.set_column(table.column_names.index(name), table.schema.field(name), moved)
        tables.append(table)
        steps, images = steps + table.num_rows, images + table.num_rows * stage.training.batch_size
    build.write_table(LOSSES, pa.concat_tables(tables))
    paces = [pace for folder in sorted(build.work.glob("stage-*")) if (pace := images_per_s(folder)) is not None]
    build.counts.update(
        num_steps=steps,
        resumed_from_step=sum(trained.resumed_from_step for trained in tuned.stages),
        images_per_s=round(paces[-1], 1) if paces else None,
        num_validation_images=num_held_out,
        validation_loss=round(tuned.validation[-1][1], 4) if tuned.validation else None,
    )


def grid_writer(
    build: Build,
    config: GeneratorTraining,
    labels: Mapping[str, Tensor],
    text: Embeddings | None,
    latents: Artifact,
    workspace: Workspace,
) -> OnGrid | None:
    """A function that draws samples of a generator in training and keeps the picture; None where none is asked for.

    Raises:
        StoreError: the latents' autoencoder, which makes images of samples, is no longer in the store.
    """
    if config.grid is None:
        return None
    from derm_pipeline.models.conditions import TEXT
    from derm_pipeline.training.grids import draw_grid, told_in_grid

    grid = config.grid
    told = told_in_grid(labels, [*config.conditions, *([TEXT] if text else [])], grid.num_each)
    if text is not None:
        told |= text.gather(told[TEXT])
    decoder = decoder_of(workspace, latents)

    def on_samples(step: int, model: Network, spec: GeneratorSpec) -> Pixels:
        picture = draw_grid(model, spec, decoder.decode, told, grid, config.training.precision)
        write_grid(build, step, picture)
        return picture

    return on_samples


def decoder_of(workspace: Workspace, latents: Artifact) -> AnyAutoencoder:
    """The autoencoder of these latents, on the device of training.

    Raises:
        StoreError: it is no longer in the store.
    """
    from derm_pipeline.models.generator import load_autoencoder
    from derm_pipeline.models.runtime import join_processes

    reference = latents.manifest.inputs["autoencoder"]
    encoder = workspace.store.get(reference)
    if encoder is None:
        raise StoreError(f"{reference}, whose latents these are, is no longer in the store: run the recipe again")
    return load_autoencoder(encoder.directory, join_processes().device)


def write_grid(build: Build, step: int, picture: Pixels) -> None:
    """Keep a picture of samples that were drawn after so many steps."""
    build.write_bytes(f"{_GRIDS}/step-{step:09d}.jpg", encode_jpeg(picture, quality=_GRID_QUALITY))


def grids(generator: Artifact) -> dict[int, Pixels]:
    """The pictures of samples that were drawn while it was trained, by the steps done, in their order."""
    names = sorted(name for name in generator.manifest.files if name.startswith(f"{_GRIDS}/step-"))
    return {
        int(name.removeprefix(f"{_GRIDS}/step-").removesuffix(".jpg")): decode(read_bytes(generator.path(name)))
        for name in names
    }


def some_grids(generator: Artifact) -> dict[int, Pixels]:
    """Of these the first, the middle and the last."""
    found = grids(generator)
    places = np.linspace(0, len(found) - 1, min(3, len(found))).round().astype(int)
    return {step: found[step] for step in (list(found)[place] for place in places)}
