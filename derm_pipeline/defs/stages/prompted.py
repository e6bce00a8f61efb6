"""What the plans of prompts know of the training images: captions to ask with, and pixels to begin from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from derm_pipeline.defs.stages.data import image_files
from derm_pipeline.defs.stages.fitting import train_counts
from derm_pipeline.defs.stages.sets import TOLD, pixel_inputs, square_reader
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import Diagnosis, SkinType, canonical
from derm_pipeline.sources.phantom import LESION_MASKS
from derm_pipeline.store import Reference

if TYPE_CHECKING:
    from derm_pipeline.generation import ReadOrigin, SampleRequest, TrainingImage
    from derm_pipeline.recipes.model import Recipe


def plan_of(recipe: Recipe, rows: pa.Table) -> list[SampleRequest]:
    """The samples that a recipe asks for, given its training set."""
    from derm_pipeline.generation import plan_requests

    diagnoses = canonical(rows["diagnosis"].to_pylist())
    return plan_requests(recipe.synthetic_dataset, diagnoses, train_counts(rows), _training_images(rows))


def origin_inputs(workspace: Workspace, recipe: Recipe) -> dict[str, Reference]:
    """What else than the training set decides the images that samples begin from."""
    from derm_pipeline.generation import Img2ImgSampling

    begins = isinstance(recipe.synthetic_dataset, Img2ImgSampling)
    return pixel_inputs(workspace, recipe) if begins else {}


def _training_images(rows: pa.Table) -> list[TrainingImage]:
    """The rows of a training set, as plans know them, with what the generator was told of them."""
    from derm_pipeline.generation import TrainingImage

    names = ["sha256", "diagnosis", "skin_type", TOLD if TOLD in rows.column_names else "text"]
    return [
        TrainingImage(sha256, Diagnosis(diagnosis), SkinType(skin_type) if skin_type else None, text)
        for sha256, diagnosis, skin_type, text in zip(*(rows[name].to_pylist() for name in names), strict=True)
    ]


def origin_reader(workspace: Workspace, recipe: Recipe, rows: pa.Table) -> ReadOrigin | None:
    """Reads the training images that samples begin from; None where they begin from noise."""
    from derm_pipeline.generation import Img2ImgSampling, OriginImages

    config = recipe.synthetic_dataset
    if not isinstance(config, Img2ImgSampling):
        return None
    read = square_reader(workspace, recipe)
    return OriginImages(
        {file.sha256: file for file in image_files(workspace, rows)},
        lambda files: read(files, None),
        geometry=recipe.latents.geometry,
        lesion=config.lesion,
        masks=_lesion_masks(workspace, rows) if config.lesion == "kept" else None,
    )


def _lesion_masks(workspace: Workspace, rows: pa.Table) -> dict[str, Path]:
    """The masks that sources have of their lesions, by the image's sha256."""
    found = {}
    columns = (rows[name].to_pylist() for name in ("source", "image_id", "sha256", "concepts"))
    for source, image_id, sha256, concepts in zip(*columns, strict=True):
        named = dict(concepts or ()).get("lesion_mask", f"{LESION_MASKS}/{image_id}.png")
        path = workspace.source_folder(source) / named
        if path.is_file():
            found[sha256] = path
    return found
