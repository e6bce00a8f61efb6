"""What the plans of prompts know of the training images: captions to ask with, and pixels to begin from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from derm_pipeline.defs.stages.data import image_files
from derm_pipeline.defs.stages.sets import square_reader
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.sources.phantom import LESION_MASKS

if TYPE_CHECKING:
    from derm_pipeline.generation import ReadOrigin, TrainingImage
    from derm_pipeline.recipes.model import Recipe


def training_images(rows: pa.Table, caption: str) -> list[TrainingImage]:
    """The rows of a training set, as plans know them; their captions stand in this column."""
    from derm_pipeline.generation import TrainingImage

    names = ["sha256", "diagnosis", "skin_type", caption]
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
    return OriginImages(
        {file.sha256: file for file in image_files(workspace, rows)},
        square_reader(workspace, recipe),
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
