"""Immutable, memoised artifacts and the lineage between them.

An artifact is a directory `<root>/<asset>/<partition>/<key>/` whose `manifest.json`, written last, says what it was
made from. It is built in a hidden sibling directory and renamed when complete, so whatever has a manifest is whole.
Nothing here knows what an artifact means; nothing is ever pickled.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from derm_pipeline.artifacts import (
    MANIFEST,
    WHOLE,
    Artifact,
    Manifest,
    Reference,
    Request,
    StoreError,
    content_digest,
    digest_of_file,
    digest_of_json,
    file_entries,
    read_artifact,
    replacing,
    write_json,
    write_table,
)

__all__ = [
    "MANIFEST",
    "WHOLE",
    "Artifact",
    "Build",
    "Manifest",
    "Node",
    "Problem",
    "Reference",
    "Request",
    "Store",
    "StoreError",
    "digest_of_file",
    "digest_of_json",
    "read_artifact",
    "replacing",
    "write_json",
    "write_table",
]

_WORK = ".work"
_LIBRARIES = ("derm_pipeline", "numpy", "torch", "opencv-python-headless", "pyarrow", "scipy", "pandas")


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
        files = file_entries(partial)
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
            content_digest=content_digest(files),
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


def _damaged(artifact: Artifact) -> list[str]:
    """Files that are missing or have another size than the manifest says."""
    return [
        name
        for name, entry in artifact.manifest.files.items()
        if not (artifact.directory / name).is_file() or (artifact.directory / name).stat().st_size != entry.size_bytes
    ]


def _verify_artifact(artifact: Artifact) -> list[Problem]:
    where, manifest = str(artifact.reference), artifact.manifest
    lies_at = "/".join(artifact.directory.parts[-3:])
    problems = []
    if lies_at != where:
        problems.append(Problem(lies_at, f"its manifest is that of {where}"))
    found = file_entries(artifact.directory)
    for name in sorted(manifest.files.keys() | found.keys()):
        if name not in found:
            problems.append(Problem(where, f"{name} is missing"))
        elif name not in manifest.files:
            problems.append(Problem(where, f"{name} is not in the manifest"))
        elif found[name].sha256 != manifest.files[name].sha256:
            problems.append(Problem(where, f"{name} was changed after the artifact was finished"))
    request = Request(manifest.asset, manifest.partition, manifest.inputs, manifest.settings, manifest.code_version)
    if request.key != manifest.key or content_digest(manifest.files) != manifest.content_digest:
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
