"""Folders that `derm generate` drew: which row tells of a sample, and which generator in the store drew it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from derm_pipeline.store import Artifact, Store, StoreError, digest_of_file

REQUEST, METADATA = "request.json", "metadata.parquet"
"""Files of a finished folder; `generation.folder` writes them."""

SAMPLE_ID = re.compile(r"([a-z][a-z0-9_]*)/([0-9a-f]{12})/([0-9]+)")
"""sample_id of what was drawn: recipe, folder, number."""

Drawn = tuple[Artifact, dict[str, Any] | None]
"""The generator, and what is said of the sample (as lineage.schema.json's `image`); None for a file of several."""


def is_drawn(folder: Path) -> bool:
    """Whether this is a finished folder of `derm generate`."""
    return (folder / REQUEST).is_file() and (folder / METADATA).is_file()


def drawn_called(store: Store, samples: Path, name: str) -> Drawn | None:
    """The sample of this name: a sample_id, or FILE#NUMBER of a file that holds several. None: it is no such name.

    Raises:
        StoreError: the folder has no such sample, or its generator is gone.
    """
    file, _, number = name.rpartition("#")
    if number.isdigit() and is_drawn(Path(file).parent):
        return _row(store, Path(file).parent, "file_name", f"{Path(file).name}#{int(number)}")
    found = SAMPLE_ID.fullmatch(name)
    if found is None or not is_drawn(samples / found[1] / found[2]):
        return None
    return _row(store, samples / found[1] / found[2], "sample_id", f"{found[1]}/{found[2]}/{int(found[3]):06d}")


def drawn_file(store: Store, path: Path) -> Drawn | None:
    """The sample in this file of a drawn folder; of a file of several, their generator alone. None: no such folder.

    Raises:
        StoreError: the image was changed, or its generator is gone.
    """
    path = path.resolve()
    if is_drawn(path.parent.parent):
        return _row(store, path.parent.parent, "file_name", f"images/{path.name}")
    if is_drawn(path.parent):
        return _generator(store, _metadata(path.parent)["generator_digest"][0].as_py()), None
    return None


def drawn_copy(store: Store, samples: Path, path: Path) -> Drawn | None:
    """The sample whose image file was copied here, by what it carries. None: it carries nothing of ours.

    Raises:
        StoreError: the sample that it names is another, or its folder or generator is gone.
    """
    told = _carried(path)
    found = SAMPLE_ID.fullmatch(told.get("sample_id", ""))
    if found is None:
        return None
    drawn = drawn_called(store, samples, found[0])
    if drawn is None:
        generator = _generator(store, told.get("generator_digest", ""))
        raise StoreError(
            f"{path} says that it is the sample {found[0]} of {generator.reference}, but the folder "
            f"{samples / found[1] / found[2]} is not there: give the file in the folder that it was drawn into"
        )
    assert drawn[1] is not None  # a sample_id is of one
    if drawn[1]["sha256"] != digest_of_file(path):
        raise StoreError(f"{path} says that it is the sample {found[0]}, but it was changed")
    return drawn


def _row(store: Store, folder: Path, column: str, value: str) -> Drawn:
    table = _metadata(folder)
    rows: list[dict[str, Any]] = table.filter(pc.equal(table[column], value)).to_pylist()
    if not rows:
        raise StoreError(f"{folder} has no image {value}; it has {table.num_rows:,}")
    row = rows[0]
    return _generator(store, row["generator_digest"]), row | {"sha256": _digest(folder, row)}


def _metadata(folder: Path) -> pa.Table:
    try:
        table = pq.read_table(folder / METADATA)
    except pa.ArrowException as error:
        raise StoreError(f"{folder / METADATA} cannot be read: {str(error).splitlines()[0]}") from error
    if table.num_rows == 0 or not {"file_name", "sample_id", "generator_digest"} <= set(table.column_names):
        raise StoreError(f"{folder / METADATA} does not say which generator drew the samples")
    return table


def _digest(folder: Path, row: dict[str, Any]) -> str:
    """sha256 of the file that holds the sample; of one in parquet shards, of the file that is kept there."""
    name, in_file, _ = row["file_name"].partition("#")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{folder / METADATA} names {name}, which is not in its folder")
    if not path.is_file():
        return _digest_in_shards(folder, row["sample_id"])
    if not in_file and _carried(path).get("sample_id") != row["sample_id"]:
        raise StoreError(f"{path} is not the sample {row['sample_id']} any more: it was changed")
    return digest_of_file(path)


def _digest_in_shards(folder: Path, sample_id: str) -> str:
    for shard in sorted(folder.glob("samples-*.parquet")):
        ids = pq.read_table(shard, columns=["sample_id"])["sample_id"]
        place = pc.index(ids, sample_id).as_py()
        if place >= 0:
            image = pq.read_table(shard, columns=["image"])["image"][place].as_py()
            return hashlib.sha256(image["bytes"]).hexdigest()
    raise StoreError(f"{folder} has no file of the sample {sample_id}: it was removed")


def _carried(path: Path) -> dict[str, str]:
    from derm_pipeline.generation import read_provenance

    try:
        return read_provenance(path)
    except (OSError, ValueError):  # no image, or none of ours
        return {}


def _generator(store: Store, content_digest: str) -> Artifact:
    for artifact in store.artifacts():
        if artifact.manifest.asset == "generator" and artifact.manifest.content_digest == content_digest:
            return artifact
    raise StoreError(
        f"the generator of this sample (content digest {content_digest[:16]}) is not in {store.root}: was it pruned, "
        "or is --data another folder?"
    )
