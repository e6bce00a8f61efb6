"""What leaves the store for other programs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from derm_pipeline.artifacts import replacing
from derm_pipeline.captions.carriers import Caption, Carrier, write_captions
from derm_pipeline.defs.stages.data import CAPTIONS, RECORDS, SPLITS, current_of
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import SkinType
from derm_pipeline.store import StoreError

if TYPE_CHECKING:
    from derm_pipeline.models.export import Precision
    from derm_pipeline.models.lora_forms import Form


def export_captions(
    workspace: Workspace, source: str, out: Path, *, style: str, carrier: Carrier, split: str, with_images: bool
) -> tuple[int, list[Path]]:
    """Write one source's captions to a folder; returns how many, and the files written.

    Args:
        workspace: where they were made.
        source: whose images.
        out: the folder; made where it is not there. Images lie in it as they lie in the source's folder.
        style: of the metadata captions, or "visual".
        carrier: how captions are written.
        split: train, val, test, or all.
        with_images: copy the images beside the captions. A link would let another program change the source's file.

    Raises:
        StoreError: the captions, or the splits, are not made yet, or are older than the records.
        ValueError: no image is in that split, or `out` is the source's own folder.
    """
    store = workspace.store
    folder = workspace.source_folder(source)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} is in the folder of {source} itself, whose files would be overwritten; name another")
    asset, column = ("visual_captions", "text") if style == "visual" else ("metadata_captions", style)
    used = current_of(workspace, source, [asset])
    rows = used["records"].table(RECORDS)
    rows = rows.append_column("caption", used[asset].table(CAPTIONS, [column])[column])
    if split != "all":
        sides = store.current("splits").table(SPLITS, ["source", "image_id", "split"]).to_pylist()
        side = {row["image_id"]: row["split"] for row in sides if row["source"] == source}
        if new := set(rows["image_id"].to_pylist()) - side.keys():
            raise StoreError(f"{len(new):,} images of {source} are in no split yet: materialise splits again")
        rows = rows.filter(pa.array([side.get(image_id) == split for image_id in rows["image_id"].to_pylist()]))
    if rows.num_rows == 0:
        raise ValueError(f"no image of {source} is in the split {split}")
    captions = [
        Caption(
            row["file"],
            row["caption"],
            row["diagnosis"] or row["source_label"] or None,
            SkinType(row["skin_type"]) if row["skin_type"] else None,
        )
        for row in rows.select(["file", "caption", "diagnosis", "source_label", "skin_type"]).to_pylist()
    ]
    out.mkdir(parents=True, exist_ok=True)
    if with_images:
        for caption in captions:
            target = out / caption.file_name
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as aside:
                shutil.copyfile(folder / caption.file_name, aside)
    return len(captions), write_captions(out, captions, carrier)


def export_recipe(
    workspace: Workspace, name: str, out: Path, form: Form, *, dtype: Precision | None = None
) -> list[Path]:
    """Write a recipe's generator in the form of other programs, with a card; see `models.export.export_generator`.

    Raises:
        StoreError: the generator is not finished.
        FileNotFoundError, ValueError: as there.
    """
    from derm_pipeline.models.export import Origin, export_generator

    artifact, recipe = workspace.store.current("generator", name), workspace.recipe(name)
    sources = [workspace.sources[source] for source in recipe.sources]
    origin = Origin(
        recipe=name,
        title=recipe.title,
        artifact=str(artifact.reference),
        licences=[f"{source.title}: {source.licence}" for source in sources],
        training=artifact.manifest.settings.get("generator", {}),
    )
    return export_generator(artifact.directory, out, form, origin, dtype=dtype)
