"""Immutable, memoised artifacts and the lineage between them.

An artifact is a directory `<root>/<asset>/<partition>/<key>/` whose `manifest.json`, written last, says what it was
made from. It is built in a hidden sibling directory and renamed when complete, so whatever has a manifest is whole.
Nothing here knows what an artifact means; nothing is ever pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST = "manifest.json"
WHOLE = "all"
"""The partition name of an asset that has no partitions."""

_WORK = ".work"
_LIBRARIES = ("derm_pipeline", "numpy", "torch", "diffusers", "opencv-python-headless", "pyarrow", "scikit-learn")


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


@dataclass
class Build:
    """An artifact in the making. Files written to `directory` become the artifact."""

    directory: Path
    request: Request
    previous: Artifact | None
    """The current artifact of the same asset and partition, if made with the same settings and code: rows to reuse."""
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """A folder for partial work (checkpoints, finished chunks): kept when interrupted, gone when finished."""
        path = self.directory / _WORK
        path.mkdir(parents=True, exist_ok=True)
        return path

    def path(self, name: str) -> Path:
        """Where to write the file `name`; its folder exists."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_table(self, name: str, table: pa.Table) -> None:
        write_table(self.path(name), table)

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path(name), value)

    def write_bytes(self, name: str, content: bytes) -> None:
        with replacing(self.path(name)) as aside:
            aside.write_bytes(content)


@dataclass(frozen=True)
class Node:
    """One step of a lineage walk: an artifact, and the nodes of what it was made from."""

    reference: Reference
    manifest: Manifest | None
    """None for what lies outside the store (raw images) or is no longer in it."""
    inputs: dict[str, Node]


@dataclass(frozen=True)
class Problem:
    """Something `verify` found."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Store:
    """A directory of artifacts."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def obtain(self, request: Request, make: Callable[[Build], None]) -> Artifact:
        """The artifact of this request: found if it was made before, otherwise made (or resumed) by `make`.

        A second process with the same request waits for the first and then finds its result.
        """
        with self._locked(request):
            artifact = self.find(request)
            if artifact is None:
                artifact = self._make(request, make)
            self._set_current(artifact)
        return artifact

    def find(self, request: Request) -> Artifact | None:
        """The finished artifact of this request, or None.

        Raises:
            StoreError: it is there but its files are not those of its manifest (by name and size).
        """
        directory = self._directory(request)
        if not (directory / MANIFEST).is_file():
            return None
        artifact = read_artifact(directory)
        damaged = _damaged(artifact)
        if damaged:
            raise StoreError(
                f"the artifact {artifact.reference} is damaged ({', '.join(damaged[:3])}): "
                f"remove {directory} and run again"
            )
        return artifact

    def current(self, asset: str, partition: str = WHOLE) -> Artifact:
        """The artifact of this asset and partition that was last asked for.

        Raises:
            StoreError: it was never finished.
        """
        pointer = self.root / asset / partition / "current"
        if not self.has(asset, partition):
            raise StoreError(f"{asset}/{partition} is not a finished artifact: materialise it first")
        return read_artifact(pointer.parent / pointer.read_text().strip())

    def has(self, asset: str, partition: str = WHOLE) -> bool:
        """Whether this asset and partition has a current artifact (a person may have removed what was it)."""
        pointer = self.root / asset / partition / "current"
        return pointer.is_file() and (pointer.parent / pointer.read_text().strip() / MANIFEST).is_file()

    def partitions(self, asset: str) -> list[str]:
        """Partitions of this asset that have a current artifact, sorted."""
        names = sorted(pointer.parent.name for pointer in self.root.glob(f"{asset}/*/current"))
        return [name for name in names if self.has(asset, name)]

    def artifacts(self) -> Iterator[Artifact]:
        """Every finished artifact, in the order of its path."""
        for path in sorted(self.root.glob(f"*/*/*/{MANIFEST}")):
            if not path.parent.name.startswith("."):
                yield read_artifact(path.parent)

    def get(self, reference: Reference) -> Artifact | None:
        """The referenced artifact, or None if it is not in this store."""
        directory = self.root / reference.asset / reference.partition / reference.key
        return read_artifact(directory) if (directory / MANIFEST).is_file() else None

    def resolve(self, name: str) -> Artifact:
        """The artifact called `asset/partition[/key]`, `asset` (when it has one partition), or a (part of a) key.

        Raises:
            StoreError: there is none, or more than one.
        """
        parts = name.strip("/").split("/")
        if len(parts) == 2:
            return self.current(*parts)
        if len(parts) == 1 and (self.root / name).is_dir() and len(self.partitions(name)) == 1:
            return self.current(name, self.partitions(name)[0])
        found = [
            artifact
            for artifact in self.artifacts()
            if str(artifact.reference) == name or (len(parts) == 1 and artifact.manifest.key.startswith(name))
        ]
        if len(found) != 1:
            raise StoreError(f"{len(found)} artifacts are called {name!r}; give asset/partition or asset/partition/key")
        return found[0]

    def lineage(self, artifact: Artifact) -> Node:
        """The walk from an artifact to everything that it was made from."""
        inputs = {role: self._node(reference) for role, reference in artifact.manifest.inputs.items()}
        return Node(artifact.reference, artifact.manifest, inputs)

    def _node(self, reference: Reference) -> Node:
        artifact = self.get(reference)
        return Node(reference, None, {}) if artifact is None else self.lineage(artifact)

    def verify(self) -> list[Problem]:
        """Read every file of every artifact again and name whatever is not as its manifest says."""
        problems: list[Problem] = []
        for path in sorted(self.root.glob(f"*/*/*/{MANIFEST}")):
            if path.parent.name.startswith("."):
                continue
            try:
                artifact = read_artifact(path.parent)
            except StoreError as error:
                problems.append(Problem(str(path.parent.relative_to(self.root)), str(error)))
                continue
            problems += _verify_artifact(artifact)
        return problems

    def unfinished(self) -> list[Path]:
        """Directories of interrupted builds; the same request resumes them."""
        return sorted(self.root.glob("*/*/.*.partial"))

    def prune(self, *, dry_run: bool = False) -> list[Path]:
        """Remove what no current artifact is or was made from, and interrupted builds that nobody is working on.

        Returns:
            The directories removed (or that would be).
        """
        kept: set[str] = set()
        pointers = [(path.parent.parent.name, path.parent.name) for path in self.root.glob("*/*/current")]
        waiting = [self.current(*pointer) for pointer in pointers if self.has(*pointer)]
        while waiting:
            artifact = waiting.pop()
            if str(artifact.reference) not in kept:
                kept.add(str(artifact.reference))
                waiting += [found for found in map(self.get, artifact.manifest.inputs.values()) if found]
        doomed = [artifact.directory for artifact in self.artifacts() if str(artifact.reference) not in kept]
        doomed += [path for path in self.unfinished() if not _is_locked(path.with_suffix(".lock"))]
        doomed += sorted(self.root.glob("*/*/.*.removed"))  # of a prune that was killed
        if not dry_run:
            for directory in doomed:
                _remove(directory)
        return doomed

    def _directory(self, request: Request) -> Path:
        return self.root / request.asset / request.partition / request.key

    @contextmanager
    def _locked(self, request: Request) -> Iterator[None]:
        path = self._directory(request).with_name(f".{request.key}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel releases it when the process dies, however it dies
            yield

    def _make(self, request: Request, make: Callable[[Build], None]) -> Artifact:
        final = self._directory(request)
        partial = final.with_name(f".{request.key}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)
        started = datetime.now(UTC)
        build = Build(partial, request, self._reusable(request))
        make(build)
        shutil.rmtree(partial / _WORK, ignore_errors=True)
        for aside in partial.rglob(".*.aside"):
            aside.unlink()
        files = _file_entries(partial)
        manifest = Manifest(
            asset=request.asset,
            partition=request.partition,
            key=request.key,
            inputs=dict(request.inputs),
            settings=dict(request.settings),
            code_version=request.code_version,
            counts=build.counts,
            libraries=_library_versions(),
            started=started,
            finished=datetime.now(UTC),
            files=files,
            content_digest=_content_digest(files),
        )
        write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
        if final.exists():  # without a manifest: not ours to trust
            _remove(final)
        partial.rename(final)
        return Artifact(final, manifest)

    def _reusable(self, request: Request) -> Artifact | None:
        if not self.has(request.asset, request.partition):
            return None
        previous = self.current(request.asset, request.partition)
        same_settings = digest_of_json(previous.manifest.settings) == digest_of_json(request.settings)
        same_code = previous.manifest.code_version == request.code_version
        return previous if same_settings and same_code and not _damaged(previous) else None

    def _set_current(self, artifact: Artifact) -> None:
        pointer = artifact.directory.parent / "current"
        if not pointer.is_file() or pointer.read_text().strip() != artifact.manifest.key:
            with replacing(pointer) as aside:
                aside.write_text(artifact.manifest.key + "\n")


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


def _damaged(artifact: Artifact) -> list[str]:
    """Files that are missing or have another size than the manifest says."""
    return [
        name
        for name, entry in artifact.manifest.files.items()
        if not (artifact.directory / name).is_file() or (artifact.directory / name).stat().st_size != entry.size_bytes
    ]


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


def _file_entries(directory: Path) -> dict[str, FileEntry]:
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise StoreError(f"{path} is a link; an artifact holds plain files only")
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            entries[name] = FileEntry(sha256=digest_of_file(path), size_bytes=path.stat().st_size)
    return entries


def _content_digest(files: Mapping[str, FileEntry]) -> str:
    lines = "".join(f"{name}\0{files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _verify_artifact(artifact: Artifact) -> list[Problem]:
    where, manifest = str(artifact.reference), artifact.manifest
    lies_at = "/".join(artifact.directory.parts[-3:])
    problems = []
    if lies_at != where:
        problems.append(Problem(lies_at, f"its manifest is that of {where}"))
    found = _file_entries(artifact.directory)
    for name in sorted(manifest.files.keys() | found.keys()):
        if name not in found:
            problems.append(Problem(where, f"{name} is missing"))
        elif name not in manifest.files:
            problems.append(Problem(where, f"{name} is not in the manifest"))
        elif found[name].sha256 != manifest.files[name].sha256:
            problems.append(Problem(where, f"{name} was changed after the artifact was finished"))
    request = Request(manifest.asset, manifest.partition, manifest.inputs, manifest.settings, manifest.code_version)
    if request.key != manifest.key or _content_digest(manifest.files) != manifest.content_digest:
        problems.append(Problem(where, f"{MANIFEST} was changed after the artifact was finished"))
    return problems


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove(directory: Path) -> None:
    # Renamed first: a kill in the middle must not leave something that still looks finished.
    doomed = directory.with_name(f".{directory.name.strip('.')}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)
