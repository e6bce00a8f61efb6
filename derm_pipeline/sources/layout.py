"""Where the files of a source lie: tables under one of several names, folders of images, archives to unpack."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from derm_pipeline.images import SUFFIXES
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.fetch.archives import is_to_unpack, member_names, unpack_archives
from derm_pipeline.sources.listing import find_images, fingerprint_files


class NotUnpackedError(FileNotFoundError):
    """A table is still in an archive that `Layout.unpack` unpacks; the message names the archive."""


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
        """Unpack the publisher's archives that lie in the folder; see `unpack_archives`.

        One whose tables or images lie there already, under another name or in another folder, stays packed: a second
        copy would only stand in the way of the first.
        """
        self._check(folder)
        there = self.find_images(folder).keys()
        needed = [name for name in self._waiting(folder) if self._brings_something(folder, name, there)]
        unpack_archives(folder, needed, on_progress)

    def _waiting(self, folder: Path) -> list[str]:
        """The archives that lie in the folder and are not unpacked."""
        return [name for name in self.archives if is_to_unpack(folder, name)]

    def _brings_something(self, folder: Path, archive: str, there: Collection[str]) -> bool:
        tables = [names for names in self.tables if _holds_one_of(archive, names)]
        if tables:
            return any(_only_one(folder, names) is None for names in tables)
        if archive in self.side_folders:
            return True
        members = [PurePosixPath(name) for name in member_names(folder, archive)]
        images = [path.stem for path in members if path.suffix.lower() in SUFFIXES]
        return not images or any(stem not in there for stem in images)

    def find_tables(self, folder: Path) -> tuple[str, ...]:
        """Each of the needed tables, in the order of `tables`.

        Raises:
            FileNotFoundError: the folder or one of them is missing; the message says what is expected.
            NotUnpackedError: one is missing, and an archive lies there that is not unpacked yet.
            ValueError: one is there under several names.
        """
        self._check(folder)
        found = []
        for names in self.tables:
            name = _only_one(folder, names)
            if name is None:
                raise self._missing(folder, names)
            found.append(name)
        return tuple(found)

    def _missing(self, folder: Path, names: Sequence[str]) -> FileNotFoundError:
        packed = [archive for archive in self._waiting(folder) if _holds_one_of(archive, names)]
        if packed:
            archive = f"{packed[0]}.zip"
            return NotUnpackedError(
                f"no {names[0]} in {folder} yet; {archive} lies there and is unpacked when first used"
            )
        return FileNotFoundError(f"no {names[0]} in {folder}. {self.expected}")

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

    def fingerprint(self, folder: Path, image_folders: Sequence[str] | None = None) -> str:
        """See `Source.fingerprint`: of every table that is there, every image, side picture and packed archive.

        Args:
            folder: the source's folder.
            image_folders: where its images lie, if not in those of the layout.
        """
        archives = [f"{name}.zip" for name in self._waiting(folder)]
        try:
            tables = self.find_tables(folder)
        except NotUnpackedError:
            tables = ()
        names = [*tables, *filter(None, self.find_extras(folder)), *archives]
        where = self.image_folders if image_folders is None else image_folders
        return fingerprint_files(folder, names, (*where, *self.side_folders))

    def _check(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.title} is looked for in {folder}, which is not a folder. {self.expected}")


def _holds_one_of(archive: str, names: Sequence[str]) -> bool:
    return any(name.startswith(f"{archive}/") for name in names)


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
