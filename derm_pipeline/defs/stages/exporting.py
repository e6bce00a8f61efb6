"""What leaves the store for other programs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa

from derm_pipeline.captions.carriers import Caption, Carrier, write_captions
from derm_pipeline.defs.stages.data import CAPTIONS, RECORDS, SPLITS
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import SkinType


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
        with_images: hard-link the images (copy them across file systems) beside the captions.

    Raises:
        StoreError: the captions, or the splits, are not made yet.
        ValueError: no image is on that side.
    """
    store = workspace.store
    rows = store.current("records", source).table(RECORDS)
    asset, column = ("visual_captions", "text") if style == "visual" else ("metadata_captions", style)
    rows = rows.append_column("caption", store.current(asset, source).table(CAPTIONS, [column])[column])
    if split != "all":
        sides = store.current("splits").table(SPLITS, ["source", "image_id", "split"]).to_pylist()
        side = {row["image_id"]: row["split"] for row in sides if row["source"] == source}
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
            _place(workspace.source_folder(source) / caption.file_name, out / caption.file_name)
    return len(captions), write_captions(out, captions, carrier)


def _place(file: Path, target: Path) -> None:
    """Hard-link a file; copy it where that cannot be done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(file):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
