"""From an artifact to what dagster shows of it: data version, metadata, pictures, checks."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
import numpy as np

from derm_pipeline.images import Pixels, contact_sheet, encode_jpeg
from derm_pipeline.store import Artifact

_MAX_PICTURE_BYTES = 90_000  # larger metadata freezes the UI's dialogs


def materialised(
    artifact: Artifact,
    *,
    picture: Pixels | None = None,
    pictures: Mapping[str, Pixels | None] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    checks: Iterable[dg.AssetCheckResult] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dg.MaterializeResult:
    """The materialisation of an artifact: its content digest is the data version, so equal content stops the wave."""
    manifest = artifact.manifest
    shown: dict[str, Any] = {
        "artifact": str(artifact.reference),
        "path": dg.MetadataValue.path(artifact.directory),
        "seconds_to_make": round((manifest.finished - manifest.started).total_seconds(), 2),
    }
    for name, value in _flat(manifest.counts):
        shown[name] = value
    shown |= metadata or {}
    for name, rows in (tables or {}).items():
        shown[name] = dg.MetadataValue.md(_markdown_table(rows))
    for name, image in {"picture": picture, **(pictures or {})}.items():
        if image is not None:
            shown[name] = picture_metadata(image)
    return dg.MaterializeResult(
        metadata=shown, data_version=dg.DataVersion(manifest.content_digest), check_results=list(checks)
    )


def check(name: str, problems: Sequence[str], *, blocking: bool, **metadata: Any) -> dg.AssetCheckResult:
    """A check that passes when there is no problem; otherwise it names the first ones."""
    shown = {key: value for key, value in metadata.items() if value is not None}
    return dg.AssetCheckResult(
        check_name=name,
        passed=not problems,
        severity=dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN,
        description="; ".join(problems[:5]) or None,
        metadata={"num_problems": len(problems), **shown},
    )


def picture_metadata(picture: Pixels) -> dg.MarkdownMetadataValue:
    """A picture as Markdown, small enough for the UI."""
    quality = 85
    content = encode_jpeg(picture, quality=quality)
    while len(content) > _MAX_PICTURE_BYTES and quality > 25:
        quality -= 20
        content = encode_jpeg(picture, quality=quality)
    encoded = base64.b64encode(content).decode()
    return dg.MetadataValue.md(f"![picture](data:image/jpeg;base64,{encoded})")


def thumbnail(images: Pixels, *, columns: int, rows: int = 4) -> Pixels:
    """A few of the images (n, h, w, 3), evenly taken, as one picture."""
    wanted = min(len(images), columns * rows)
    chosen = np.linspace(0, len(images) - 1, wanted).round().astype(int)
    return contact_sheet(images[chosen], columns=columns)


def _flat(counts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in counts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "nothing"
    head = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    body = "\n".join(
        "| " + " | ".join("" if value is None else _in_a_cell(value) for value in row.values()) + " |" for row in rows
    )
    return f"{head}\n{body}"


def _in_a_cell(value: Any) -> str:
    """A value of a table, also one from a source's own files, so that it cannot break out of its cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
