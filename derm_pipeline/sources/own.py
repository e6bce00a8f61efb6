"""The user's own sources: `sources.yaml` in the data folder, a mapping of names.

    clinic:
      kind: imagefolder
      path: /data/clinic            # or relative to the data folder; left out: <raw>/clinic
      licence: CC BY 4.0
      modality: clinical
      diagnoses: {naevus: nv, other: null}
    our_ham:
      kind: ham10000                # any shipped source: its layout, in another folder and under another name

`imagefolder` takes the settings of `ImageFolderConfig` beside these; the layout of a shipped source has no settings.
A shipped `imagefolder` (kvasir) may be named too, which then takes its place and keeps its labels' meanings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from derm_pipeline.records import Diagnosis
from derm_pipeline.sources.base import OnProgress, Source
from derm_pipeline.sources.imagefolder import ImageFolder, ImageFolderConfig
from derm_pipeline.sources.listing import Listing

NAME = r"[a-z][a-z0-9_]{0,63}"
"""What a source may be called: its name is a partition and a folder."""

IMAGEFOLDER = "imagefolder"
_MAX_BYTES = 1024**2


@dataclass(frozen=True)
class OwnSource:
    """One of the user's own sources."""

    source: Source
    path: Path | None
    """Where its files lie, relative to the data folder or absolute; None for the usual place."""


@dataclass(frozen=True)
class Renamed:
    """A shipped source's layout under another name."""

    source: Source
    name: str
    title: str
    licence: str
    citation: str
    homepage: str

    @property
    def diagnoses(self) -> Mapping[str, Diagnosis | None]:
        """See `Source.diagnoses`."""
        return self.source.diagnoses

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """See `Source.prepare`."""
        self.source.prepare(folder, on_progress)

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        listing = self.source.list_images(folder)
        quarantined = (row.model_copy(update={"source": self.name}) for row in listing.quarantined)
        return Listing(listing.candidates, tuple(quarantined))

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return self.source.fingerprint(folder)


class _Entry(BaseModel):
    """What may be said of every source; the keys are those of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    path: str | None = Field(default=None, min_length=1)
    title: str | None = None
    licence: str | None = None
    citation: str | None = None
    homepage: str | None = None


class _ImageFolderEntry(ImageFolderConfig, _Entry):
    licence: str = Field(min_length=1)
    """Needed: the card of every synthetic dataset names the licences of what it was made from."""


def own_sources(file: Path, kinds: Mapping[str, Source]) -> dict[str, OwnSource]:
    """The sources in the file, by name; none where there is no file.

    Args:
        file: `sources.yaml`.
        kinds: the shipped sources by name, whose layouts may be used and whose names may not, but for imagefolders.

    Raises:
        ValueError: naming the file, the key and what is allowed there.
    """
    if not file.exists():
        return {}
    return {name: _own(file, name, settings, kinds) for name, settings in _parse(file).items()}


def _parse(file: Path) -> dict[Any, Any]:
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are read")
    try:
        settings = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)  # noqa: S506  a safe loader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{file}: not YAML ({line}{error.problem})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not YAML ({str(error).splitlines()[0]})") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: a mapping of source names is expected, each with its settings (kind, path ...)")
    return settings


class _Loader(yaml.SafeLoader):
    """Plain data only, without aliases (a few lines of them can unfold without end), and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            at = next(at for at, key in enumerate(keys) if key in keys[:at])
            mark = node.value[at][0].start_mark
            raise yaml.MarkedYAMLError(problem=f"the key {keys[at]!r} is there twice", problem_mark=mark)
        return found


def _own(file: Path, name: Any, settings: Any, kinds: Mapping[str, Source]) -> OwnSource:
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ValueError(
            f"{file}: {name!r}: a source's name is of a to z, 0 to 9 and _ (at most 64), and begins with a letter"
        )
    shipped = kinds.get(name)
    if (shipped is not None and not isinstance(shipped, ImageFolder)) or name == IMAGEFOLDER:
        raise ValueError(f"{file}: {name}: is the name of a shipped source or kind; choose another")
    allowed = ", ".join((IMAGEFOLDER, *kinds))
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: {name}: its settings are expected, at least `kind` (one of {allowed})")
    kind = settings.get("kind")
    if not isinstance(kind, str) or (kind != IMAGEFOLDER and kind not in kinds):
        what = "is missing" if kind is None else f"{kind!r} is not known"
        raise ValueError(f"{file}: {name}.kind: {what}; allowed: {allowed}")
    model = _ImageFolderEntry if kind == IMAGEFOLDER else _Entry
    try:
        entry = model.model_validate(settings)
    except ValidationError as error:
        raise ValueError(_explain(error, file, name, kind, model)) from error
    path = None if entry.path is None else Path(entry.path)
    if isinstance(entry, _ImageFolderEntry):
        return OwnSource(_image_folder(name, entry, shipped), path)
    return OwnSource(_renamed(kinds[kind], name, entry), path)


def _image_folder(name: str, entry: _ImageFolderEntry, shipped: Source | None) -> ImageFolder:
    settings = ImageFolderConfig.model_validate({key: getattr(entry, key) for key in ImageFolderConfig.model_fields})
    if isinstance(shipped, ImageFolder):  # whose place it takes: its labels go on meaning what they did
        known = shipped.settings.diagnoses | settings.diagnoses
        settings = settings.model_copy(update={"diagnoses": known})
    return ImageFolder(
        name=name,
        title=entry.title or name,
        licence=entry.licence,
        citation=entry.citation or "",
        homepage=entry.homepage or "",
        settings=settings,
    )


def _renamed(source: Source, name: str, entry: _Entry) -> Renamed:
    return Renamed(
        source,
        name,
        title=entry.title or f"{name} (as {source.title})",
        licence=entry.licence or source.licence,
        citation=source.citation if entry.citation is None else entry.citation,
        homepage=source.homepage if entry.homepage is None else entry.homepage,
    )


def _explain(error: ValidationError, file: Path, name: str, kind: str, model: type[BaseModel]) -> str:
    """The first few complaints, each with its key and what is allowed there."""
    lines = []
    for complaint in error.errors()[:5]:
        location = [str(part) for part in complaint["loc"] if part != "[key]"]
        message = complaint["msg"].removeprefix("Value error, ")
        if complaint["type"] == "extra_forbidden":
            message = f"unknown key; the kind {kind} allows {', '.join(model.model_fields)}"
        elif complaint["type"] == "missing":
            message = "is missing"
        elif "[key]" in complaint["loc"]:
            message = f"unknown here; {message}"
        lines.append(f"{file}: {'.'.join([name, *location])}: {message}")
    return "\n".join(lines)
