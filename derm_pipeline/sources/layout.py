"""Where the files of a source lie: tables under one of several names, folders of images, archives to unpack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from derm_pipeline.sources.archives import unpack_archives
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.listing import find_images, fingerprint_files


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The publisher's layout of one source's folder; all paths are relative to it, with forward slashes."""

    title: str
    """The source's name for people."""
    expected: str
    """What should lie in the folder and where it is to be had: the end of every message about something missing."""
    tables: tuple[tuple[str, ...], ...]
    """For each needed table the names under which it is distributed; one of them is expected."""
    extras: tuple[tuple[str, ...], ...] = ()
    """The same for tables that may be absent."""
    image_folders: tuple[str, ...]
    """Where images are looked for. Any other folder is passed over."""
    side_folders: tuple[str, ...] = ()
    """Folders of pictures that belong to an image (masks) and become no record."""
    archives: tuple[str, ...] = ()
    """Zip archives without their suffix, as the publisher names them."""

    def unpack(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Unpack the publisher's archives that lie in the folder; see `unpack_archives`."""
        self._check(folder)
        unpack_archives(folder, self.archives, on_progress)

    def find_tables(self, folder: Path) -> tuple[str, ...]:
        """Each of the needed tables, in the order of `tables`.

        Raises:
            FileNotFoundError: the folder or one of them is missing; the message says what is expected.
            ValueError: one is there under several names.
        """
        self._check(folder)
        found = []
        for names in self.tables:
            name = _only_one(folder, names)
            if name is None:
                raise FileNotFoundError(f"no {names[0]} in {folder}. {self.expected}")
            found.append(name)
        return tuple(found)

    def find_extras(self, folder: Path) -> tuple[str | None, ...]:
        """Each of the tables that may be absent, in the order of `extras`; None for one that is.

        Raises:
            ValueError: one is there under several names.
        """
        return tuple(_only_one(folder, names) for names in self.extras)

    def find_images(self, folder: Path) -> dict[str, list[str]]:
        """Image files by image_id; see `listing.find_images`."""
        return find_images(folder, self.image_folders)

    def require_images(self, folder: Path) -> None:
        """Raises FileNotFoundError where there is not one image file."""
        if not self.find_images(folder):
            raise FileNotFoundError(f"no image file in {folder}. {self.expected}")

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`: of every table that is there, every image and every side picture."""
        tables = [*self.find_tables(folder), *filter(None, self.find_extras(folder))]
        return fingerprint_files(folder, tables, (*self.image_folders, *self.side_folders))

    def _check(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.title} is looked for in {folder}, which is not a folder. {self.expected}")


def _only_one(folder: Path, names: Sequence[str]) -> str | None:
    found = [name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has several tables: {', '.join(found)}; keep the one that is meant")
    return found[0] if found else None


def subfolders(folder: Path, below: str) -> Iterator[str]:
    """`below` and every folder under it, hidden ones and links left out, as sorted relative paths."""
    if not (folder / below).is_dir():
        return
    yield below
    for path in sorted((folder / below).iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from subfolders(folder, f"{below}/{path.name}")
