"""The image files anywhere below a folder, and the image_id that follows from a file's path."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from derm_pipeline.images import SUFFIXES
from derm_pipeline.sources.identity import archive_names
from derm_pipeline.sources.listing import OTHER_SUFFIXES, BadRowError

MAX_FOLDERS_DEEP = 16
MAX_FILES = 5_000_000
_SUFFIXES = SUFFIXES | OTHER_SUFFIXES
_MAX_ID_CHARS = 128


@dataclass(frozen=True)
class Tree:
    """What lies below a folder, as sorted relative paths with forward slashes."""

    images: tuple[str, ...]
    others: tuple[str, ...]
    """All other files."""
    links: tuple[str, ...]
    """Links to folders; they are not followed."""


def look_below(folder: Path) -> Tree:
    """Every file below a folder, hidden files and folders passed over; no file is opened.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: folders lie deeper than `MAX_FOLDERS_DEEP`, or there are more than `MAX_FILES` files.
    """
    images: list[str] = []
    others: list[str] = []
    links: list[str] = []
    for name, is_link_to_folder in _entries(folder):
        if is_link_to_folder:
            links.append(name)
        elif "." + name.rpartition(".")[2].lower() in _SUFFIXES:
            images.append(name)
        else:
            others.append(name)
        if len(images) + len(others) > MAX_FILES:
            raise ValueError(f"{folder} holds more than {MAX_FILES:,} files; no more are read")
    return Tree(tuple(sorted(images)), tuple(sorted(others)), tuple(sorted(links)))


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        if prefix.count("/") > MAX_FOLDERS_DEEP:
            raise ValueError(f"{folder / prefix} lies more than {MAX_FOLDERS_DEEP} folders deep; move it up")
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(prefix + entry.name + "/")
                else:
                    yield prefix + entry.name, entry.is_symlink() and entry.is_dir()


def checked_path(column: str, text: str) -> str:
    """A relative path as it stands in a table, without "." and double slashes.

    Raises:
        BadRowError: there is none, or it leads out of the folder.
    """
    if not text:
        raise BadRowError(f"the row has no {column}")
    shown = repr(text[:200])
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or re.match(r"[A-Za-z]:[\\/]", text):
        raise BadRowError(f"{column} {shown} leaves the source's folder; a relative path below it is expected")
    if "\\" in text:
        raise BadRowError(f"{column} {shown} holds a backslash; write forward slashes between folders")
    return path.as_posix()


def image_ids(files: Iterable[str]) -> dict[str, str]:
    """File -> image_id: the path without its suffix, with __ for / and _ for what an image_id may not hold.

    A file whose name an archive gave (ISIC_0000001) is called so wherever it lies, so that it is known to be the same
    image as in another source. A name that is too long ends in a digest of the path. Different files may get one id.
    """
    paths = list(dict.fromkeys(files))
    stems = [PurePosixPath(path).stem for path in paths]
    archived = archive_names(pa.array([stem if stem.isascii() else None for stem in stems], pa.string())).to_pylist()
    return {
        path: stem if name else _safe(path.removesuffix(PurePosixPath(path).suffix))
        for path, stem, name in zip(paths, stems, archived, strict=True)
    }


def _safe(path: str) -> str:
    image_id = re.sub(r"[^A-Za-z0-9_.\-]", "_", path.replace("/", "__"))
    if not re.match(r"[A-Za-z0-9]", image_id):
        image_id = "x" + image_id
    if len(image_id) > _MAX_ID_CHARS:
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        image_id = f"{image_id[: _MAX_ID_CHARS - 17]}-{digest}"
    return image_id


def clashes(ids: dict[str, str]) -> dict[str, str]:
    """File -> why it cannot have its image_id, for all files that would share one.

    Where one of them has the id by its very name, without a sign replaced, it keeps it.
    """
    files_of: dict[str, list[str]] = {}
    for file, image_id in ids.items():
        files_of.setdefault(image_id, []).append(file)
    found = {}
    for image_id, files in files_of.items():
        exact = [file for file in files if file.rpartition(".")[0] == image_id]
        keeps = exact[0] if len(exact) == 1 else None
        if len(files) > 1:
            reason = f"several files for one image_id ({image_id}): {', '.join(sorted(files)[:10])}; rename or keep one"
            found.update({file: reason for file in files if file != keeps})
    return found
