"""Zip archives of a source, unpacked beside themselves: all of an archive or nothing, and never outside its folder.

An archive comes from elsewhere, so its table of contents is judged before a byte is written: where its members would
lie, what they are, how large they become. Images stay as they are; decoding them is the scan's business.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from derm_pipeline.images import MAX_BYTES

if TYPE_CHECKING:
    from derm_pipeline.sources.base import OnProgress

MAX_MEMBERS = 2_000_000
MAX_RATIO = 200
"""Bytes unpacked for a byte packed, at most, in a member of more than `RATIO_FROM_BYTES`; photographs reach about 1."""
RATIO_FROM_BYTES = 10_000_000
SPARE_BYTES = 100_000_000
"""Space that is left free on the disk."""

_BLOCK = 4096  # what a file system hands out at a time
_CHUNK = 1 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
    OverflowError,
)
"""What zipfile raises for bytes that are no zip archive."""
_MAC_EXTRAS = "__MACOSX"  # copies of file attributes that macOS adds; no part of what was packed
_Show = Callable[[int], None]


@dataclass(frozen=True)
class _Plan:
    """What of an archive is written, and where."""

    members: tuple[tuple[zipfile.ZipInfo, PurePosixPath], ...]
    """Each file with its path below the unpacked folder."""
    folders: tuple[PurePosixPath, ...]


def unpack_archives(folder: Path, names: Sequence[str], on_progress: OnProgress | None = None) -> list[str]:
    """Unpack `<folder>/<name>.zip` into `<folder>/<name>/`, where the archive is there and the folder is not.

    A folder appears when it is complete: an interrupted unpacking starts again, and a second process waits for the
    first and then finds its result. If everything in the archive lies in a folder called like `name`, it is not nested.
    The archive stays. The extras of macOS (`__MACOSX/`) are left out.

    Args:
        folder: the source's folder.
        names: archives without their suffix, relative to the folder, with forward slashes.
        on_progress: called as (bytes of archives done, bytes of archives to unpack).

    Returns:
        The names that were unpacked now.

    Raises:
        ValueError: an archive is damaged, or holds what is not unpacked (a path outside, a link, an encrypted,
            oversized or overcompressed member, too many members); or the disk has too little space. Nothing is left.
        OSError: the folder cannot be written to.
    """
    todo = [name for name in names if is_to_unpack(folder, name)]
    total = sum(_archive(folder, name).stat().st_size for name in todo)
    unpacked = []
    done = 0
    for name in todo:
        archive = _archive(folder, name)

        def show(num_bytes: int, before: int = done) -> None:
            if on_progress is not None:
                on_progress(min(before + num_bytes, total), total)

        with _explaining(archive, folder / name), lock_file(_hidden(folder / name, "lock")):
            if is_to_unpack(folder, name):  # nobody else did, while we waited
                _unpack(archive, folder / name, show)
                unpacked.append(name)
        size_bytes = archive.stat().st_size if archive.exists() else 0
        show(size_bytes)
        done += size_bytes
    return unpacked


def member_names(folder: Path, name: str) -> list[str]:
    """The paths of what an archive holds, as they stand in it.

    Raises:
        ValueError: it is damaged, or has too many members.
    """
    archive = _archive(folder, name)
    with _open(archive) as opened:
        _check_contents(archive, opened.infolist())
        return opened.namelist()


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock that `path` stands for; another process or thread waits. The file is gone afterwards.

    The kernel releases the lock when the process dies, however it dies.
    """
    while True:
        with path.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not _is_same_file(handle.fileno(), path):
                continue  # the one before us removed it: whoever comes now would lock another file
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin what the disk has no space for.

    Args:
        folder: where it is to be written; it exists.
        needed_bytes: bytes that will be written.
        what: the doing, as the message's beginning ("unpacking a.zip").

    Raises:
        ValueError: with how much is needed and how much is free.
    """
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes + SPARE_BYTES > free_bytes:
        raise ValueError(
            f"{what} needs {in_words(needed_bytes + SPARE_BYTES)} and the disk of {folder} has {in_words(free_bytes)} "
            f"free; free {in_words(needed_bytes + SPARE_BYTES - free_bytes)} or use another disk, and run it again"
        )


def in_words(num_bytes: int) -> str:
    """A size for people, in decimal units: "512 bytes", "2.8 GB"."""
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    size = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB"


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _archive(folder: Path, name: str) -> Path:
    return folder / f"{name}.zip"


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def is_to_unpack(folder: Path, name: str) -> bool:
    """Whether `<folder>/<name>.zip` is there and the folder into which it is unpacked is not."""
    return _archive(folder, name).is_file() and not os.path.lexists(folder / name)


@contextmanager
def _explaining(archive: Path, target: Path) -> Iterator[None]:
    """Says what to do about a folder that cannot be written to."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        advice = f"{error.strerror}; unpack {archive.name} yourself into {target.name}/, or copy it elsewhere"
        raise OSError(error.errno, advice, str(target.parent)) from error


def _unpack(archive: Path, target: Path, show: _Show) -> None:
    aside = _hidden(target, "unpacking")
    if aside.exists():  # of a process that was killed
        shutil.rmtree(aside)
    try:
        with _open(archive) as opened:
            plan = _plan(archive, opened.infolist(), target.name)
            needed_bytes = sum(-(-info.file_size // _BLOCK) * _BLOCK for info, _ in plan.members)
            require_space(archive.parent, needed_bytes, f"unpacking {archive.name}")
            aside.mkdir()
            _write_all(archive, opened, plan, aside, show)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: sent to an offset before the file
            raise
        raise ValueError(
            f"{archive} is not a whole zip archive ({error}); remove it and download it again, the download may have "
            "been cut short"
        ) from error


def _write_all(archive: Path, opened: zipfile.ZipFile, plan: _Plan, aside: Path, show: _Show) -> None:
    for relative in plan.folders:
        (aside / relative).mkdir(parents=True, exist_ok=True)
    done = 0
    for position, (info, relative) in enumerate(plan.members):
        try:
            with opened.open(info) as packed, (aside / relative).open("xb") as plain:
                shutil.copyfileobj(packed, plain, _CHUNK)  # reads no more than the announced size, and checks the CRC
        except _DAMAGE as error:
            raise ValueError(
                f"{archive} is damaged at its member {_shown(info)} ({error}); remove it and download it again"
            ) from error
        done += info.compress_size
        if position % 64 == 0:
            show(done)


def _plan(archive: Path, infos: Sequence[zipfile.ZipInfo], name: str) -> _Plan:
    """Judge the table of contents, and lay out what is written."""
    _check_contents(archive, infos)
    files: dict[PurePosixPath, zipfile.ZipInfo] = {}
    folders: set[PurePosixPath] = set()
    for info in infos:
        path = PurePosixPath(info.filename)
        problem = _problem(info) or ("is there twice" if path in files else None)
        if problem is not None:
            raise ValueError(f"{archive}: the member {_shown(info)} {problem}; nothing of the archive is unpacked")
        if path.parts[0] == _MAC_EXTRAS:
            continue
        if info.is_dir():
            folders.add(path)
        else:
            files[path] = info
            folders.update(path.parents)
    for path in folders & files.keys():
        raise ValueError(f"{archive}: the member {_shown(files[path])} is both a file and a folder")
    if not files:
        raise ValueError(f"{archive} holds no file; remove it and download it again")
    nested = all(path.parts[0] == name and len(path.parts) > 1 for path in files)
    prefix = PurePosixPath(name if nested else ".")
    return _Plan(
        tuple((info, path.relative_to(prefix)) for path, info in files.items()),
        tuple(sorted(path.relative_to(prefix) for path in folders if path.is_relative_to(prefix))),
    )


def _check_contents(archive: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    size_bytes = archive.stat().st_size
    if len(infos) > MAX_MEMBERS:
        raise ValueError(f"{archive} has {len(infos):,} members; at most {MAX_MEMBERS:,} are unpacked")
    if any(not 0 <= info.header_offset < size_bytes for info in infos):
        raise ValueError(f"{archive} is damaged in its table of contents; remove it and download it again")
    if sum(info.compress_size for info in infos) > size_bytes:
        raise ValueError(f"{archive} announces more bytes than it has (overlapping members); it is not unpacked")


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Why a member is not unpacked, or None."""
    return _problem_of_name(info) or _problem_of_kind(info) or _problem_of_size(info)


def _problem_of_name(info: zipfile.ZipInfo) -> str | None:
    name = info.orig_filename  # as it stands in the archive; zipfile mends the other one
    path = PurePosixPath(name)
    if path.is_absolute() or name[1:2] == ":":
        return "has an absolute path"
    if ".." in path.parts:
        return "has a path that leaves the folder"
    if not path.parts or "\\" in name or not name.isprintable():
        return "has a name that is not allowed (empty, or with a backslash or a control character)"
    if any(len(os.fsencode(part)) > 255 for part in path.parts) or len(os.fsencode(name)) > 2000:
        return "has too long a name"
    return None


def _problem_of_kind(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.compress_type not in _METHODS:
        return f"is packed by a method that is not supported ({info.compress_type}); unpack the archive by other means"
    return None


def _problem_of_size(info: zipfile.ZipInfo) -> str | None:
    if info.file_size > MAX_BYTES:
        return f"has {info.file_size:,} bytes; at most {MAX_BYTES:,} are read"
    if info.file_size > RATIO_FROM_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        return f"grows from {info.compress_size:,} to {info.file_size:,} bytes, like a decompression bomb"
    return None


def _shown(info: zipfile.ZipInfo) -> str:
    name = info.orig_filename
    return repr(name if len(name) <= 200 else name[:200] + " ...")
