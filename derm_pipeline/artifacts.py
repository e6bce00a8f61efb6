"""What an artifact is: where it lies, what it was made from, what it holds; and files written all or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST = "manifest.json"
WHOLE = "all"
"""The partition name of an asset that has no partitions."""


class StoreError(ValueError):
    """What a user can cause in a store; the message says what to do."""


class Reference(BaseModel):
    """One exact artifact: where it lies and what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asset: str
    partition: str
    key: str
    content_digest: str

    def __str__(self) -> str:
        return f"{self.asset}/{self.partition}/{self.key}"


class FileEntry(BaseModel):
    """Digest and size of one file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    size_bytes: int


class Manifest(BaseModel):
    """What an artifact is: its request (inputs, settings, code version) and its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asset: str
    partition: str
    key: str
    inputs: dict[str, Reference]
    """Role -> the artifact that played it."""
    settings: dict[str, Any]
    code_version: str
    counts: dict[str, Any]
    """Numbers of items and figures worth showing beside the artifact."""
    libraries: dict[str, str]
    started: datetime
    finished: datetime
    files: dict[str, FileEntry]
    content_digest: str


@dataclass(frozen=True)
class Artifact:
    """A finished artifact."""

    directory: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """The file `name` of this artifact; it must be one that the manifest lists (or a folder of such)."""
        path = self.directory / name
        if not path.exists():
            raise StoreError(f"{self.reference} has no file {name}; it was damaged: run `derm verify`")
        return path

    @property
    def reference(self) -> Reference:
        manifest = self.manifest
        return Reference(
            asset=manifest.asset,
            partition=manifest.partition,
            key=manifest.key,
            content_digest=manifest.content_digest,
        )

    @property
    def counts(self) -> dict[str, Any]:
        return self.manifest.counts

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One of the artifact's parquet tables."""
        return pq.read_table(self.path(name), columns=columns)

    def json(self, name: str) -> Any:
        """One of the artifact's JSON files."""
        return json.loads(self.path(name).read_text())


@dataclass(frozen=True)
class Request:
    """What is asked of the store: the same request finds the same artifact."""

    asset: str
    partition: str
    inputs: Mapping[str, Reference]
    settings: Mapping[str, Any]
    code_version: str

    @property
    def key(self) -> str:
        """Digest of the inputs' contents, the settings and the code version (not of where the inputs lie)."""
        identity = {
            "asset": self.asset,
            "inputs": {role: reference.content_digest for role, reference in self.inputs.items()},
            "settings": self.settings,
            "code_version": self.code_version,
        }
        return digest_of_json(identity)[:16]


def read_artifact(directory: Path) -> Artifact:
    """The finished artifact in this directory.

    Raises:
        StoreError: there is no manifest, or it is not one of ours.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise StoreError(f"{directory} is not a finished artifact (no {MANIFEST}): materialise it first")
    try:
        return Artifact(directory, Manifest.model_validate_json(path.read_text()))
    except ValidationError as error:
        wrong = f"{error.error_count()} fields are wrong"
        raise StoreError(f"{path} is not a manifest ({wrong}): remove {directory} and run again") from error


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Digest and size of every file of an artifact but its manifest, by name."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise StoreError(f"{path} is a link; an artifact holds plain files only")
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            entries[name] = FileEntry(sha256=digest_of_file(path), size_bytes=path.stat().st_size)
    return entries


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """One digest of names and contents."""
    lines = "".join(f"{name}\0{files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest_of_json(value: Any) -> str:
    """sha256 of a JSON value, written canonically."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A sibling to write to, which then takes `path`'s place at once: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.aside")
    yield aside
    with aside.open("rb") as handle:
        os.fsync(handle.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, readable and in a fixed order, all of it or nothing."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet table, all of it or nothing; the same rows give the same bytes."""
    with replacing(path) as aside:
        pq.write_table(table, aside, compression="zstd")
