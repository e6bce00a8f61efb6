"""Get a dataset from its publisher: what is downloaded once is recorded, and checked whenever it is asked for again.

`.fetched.json` in the source's folder says which licence was accepted when, and the sha256 of every file at its first
download. Nothing there is ever overwritten unasked. Import this module only when fetching: pooch is slow to load.
"""

from __future__ import annotations

import csv
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import pooch
import requests

from derm_pipeline.artifacts import digest_of_file, write_json
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.fetch.archives import lock_file, require_space, unpack_archives
from derm_pipeline.sources.fetch.downloads import Application, Direct, Download, ListedImages, RemoteFile
from derm_pipeline.sources.fetch.ledger import LEDGER, AcceptedLicence, LedgerFile, read_ledger
from derm_pipeline.sources.fetch.listings import list_dataverse
from derm_pipeline.sources.fetch.transfer import (
    FetchError,
    NotThereError,
    ResumingDownloader,
    announced_size,
    new_session,
)

WORK = ".fetching"
"""Partial files, in the source's folder; gone when everything is there."""
MAX_FAILURES = 10
"""Images that cannot be had before the rest is not tried either."""

_SAVE_EVERY = 500


class LicenceError(ValueError):
    """The licence was not accepted yet; the message shows it."""


@dataclass
class FetchResult:
    """What a fetch did; every file wanted is in exactly one of the first four."""

    downloaded: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    """Was there, and is what was recorded (or was recorded now)."""
    unpacked_before: list[str] = field(default_factory=list)
    """Archives that are gone, while the folder unpacked from them is there."""
    absent: list[str] = field(default_factory=list)
    """Images that the table names and the server does not have."""
    refused: list[str] = field(default_factory=list)
    """Paths in the table that are not what paths of images look like there; not asked for."""
    unpacked: list[str] = field(default_factory=list)
    outdated_folders: list[str] = field(default_factory=list)
    """Folders unpacked from an archive that was replaced now: remove them, and fetch again."""
    still_missing: str = ""
    """What must be got by other means, and how."""


def fetch(
    download: Download,
    folder: Path,
    *,
    licence: str,
    accept_licence: bool = False,
    replace_changed: bool = False,
    unpack: bool = True,
    mirror: str | None = None,
    num_connections: int = 4,
    on_progress: OnProgress | None = None,
) -> FetchResult:
    """Download what is not there yet, check what is, and unpack the archives.

    Called again after an interruption it goes on where it was, within a file too. A second process waits for the first.

    Args:
        download: from `DOWNLOADS`.
        folder: the source's folder; made where it is not there.
        licence: the terms as shown to the user; accepted once, and again when they change.
        accept_licence: the user accepts them now.
        replace_changed: download anew what differs from its record; otherwise that is an error.
        unpack: unpack zip archives afterwards.
        mirror: scheme and host (and port) to ask in place of every publisher's.
        num_connections: images downloaded at the same time.
        on_progress: called as (done, total): bytes for files, then images where a table lists them, then bytes of
            archives unpacked; each counts from the start.

    Raises:
        LicenceError: the licence is not accepted.
        FetchError: something cannot be had, has a wrong checksum, or differs from its record; the rest is kept.
        ValueError: the dataset is not for direct download, the disk is too small, or an archive is not unpacked.
        OSError: the folder cannot be written to.
    """
    if isinstance(download, Application):
        steps = " ".join(f"({number}) {step}" for number, step in enumerate(download.steps, 1))
        raise ValueError(f"{download.title} is given out by its publisher, {download.homepage}: {steps}")
    _require_licence(download, folder, licence, accept_licence)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / ".fetch.lock"), _quiet_pooch():
        run = _Fetch(download, folder, replace_changed, mirror, num_connections, on_progress)
        run.accept(licence)
        result = run.all_files()
    if unpack:
        names = [name.removesuffix(".zip") for name in run.archives]
        result.unpacked = unpack_archives(folder, names, on_progress)
    return result


def _require_licence(download: Direct, folder: Path, licence: str, accept_licence: bool) -> None:
    accepted = any(known.text == licence for known in read_ledger(folder).licences)
    if not accepted and not accept_licence:
        raise LicenceError(
            f"{download.title} comes under this licence: {licence} ({download.homepage}). If you accept it, run this "
            "again with --accept-licence; that is recorded and not asked again"
        )


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Pooch writes a line for every file to the terminal; what there is to say is said by us."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Fetch:
    """One call of `fetch`, with its ledger."""

    def __init__(
        self,
        download: Direct,
        folder: Path,
        replace_changed: bool,
        mirror: str | None,
        num_connections: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.download = download
        self.folder = folder
        self.replace_changed = replace_changed
        self.mirror = mirror
        self.num_connections = num_connections
        self.on_progress = on_progress or (lambda done, total: None)
        self.ledger = read_ledger(folder)
        self.result = FetchResult(still_missing=download.missing)
        self.archives: list[str] = []
        self.work = folder / WORK
        self._threads = threading.local()

    def accept(self, licence: str) -> None:
        if all(known.text != licence for known in self.ledger.licences):
            self.ledger.licences.append(AcceptedLicence(text=licence, accepted=datetime.now(UTC)))
            self._save()

    def all_files(self) -> FetchResult:
        self.work.mkdir(exist_ok=True)
        for left in self.work.glob("tmp*"):  # pooch's, of a process that was killed
            left.unlink()
        files = [replace(remote, url=self._address(remote.url)) for remote in self._files()]
        self.archives = [remote.name for remote in files if remote.name.endswith(".zip")]
        try:
            self._fetch_files(files)
            if self.download.images is not None:
                self._fetch_images(self.download.images)
        finally:
            self._save()
        shutil.rmtree(self.work, ignore_errors=True)
        return self.result

    def _files(self) -> list[RemoteFile]:
        files = list(self.download.files)
        if self.download.dataverse is not None:
            files += list_dataverse(self.download.dataverse, self._get_listing)
        return files

    def _get_listing(self, url: str) -> bytes:
        path = self.work / "listing.json"
        self._downloader("listing.json")(self._address(url), path, None)
        content = path.read_bytes()
        path.unlink()
        return content

    def _fetch_files(self, files: Sequence[RemoteFile]) -> None:
        sizes = {remote.name: announced_size(self._session, remote.url) for remote in files}
        wanted = [remote for remote in files if self._is_wanted(remote, sizes[remote.name])]
        self._save()
        needed = {remote.name: sizes[remote.name] or remote.size_bytes or 0 for remote in wanted}
        for remote in wanted:
            twice = 2 if remote.name.endswith(".zip") else 1  # it is unpacked beside itself
            part = self.work / f"{_flat(remote.name)}.part"
            needed[remote.name] = twice * needed[remote.name] - (part.stat().st_size if part.exists() else 0)
        require_space(self.folder, sum(needed.values()), f"downloading {self.download.title}")
        total = sum(sizes[remote.name] or remote.size_bytes or 0 for remote in wanted)
        done = 0
        for remote in wanted:

            def show(num_bytes: int, before: int = done) -> None:
                self.on_progress(min(before + num_bytes, total), total)

            self._get(remote, show)
            self._save()
            done += sizes[remote.name] or remote.size_bytes or 0

    def _is_wanted(self, remote: RemoteFile, announced_bytes: int | None) -> bool:
        """Whether a file is to be downloaded; one that is there is checked instead."""
        path = self.folder / remote.name
        if not path.is_file():
            unpacked = remote.name.endswith(".zip") and path.with_suffix("").is_dir()
            if unpacked:
                self.result.unpacked_before.append(remote.name)
            return not unpacked
        difference = self._difference(remote, announced_bytes)
        if difference is None:
            self.result.verified.append(remote.name)
            return False
        if not self.replace_changed:
            raise FetchError(
                f"{path} is not what was fetched: {difference}. It is left as it is and nothing is downloaded; to "
                "download it anew run this again with --replace-changed"
            )
        if remote.name.endswith(".zip") and path.with_suffix("").is_dir():
            self.result.outdated_folders.append(remote.name.removesuffix(".zip"))
        return True

    def _difference(self, remote: RemoteFile, announced_bytes: int | None) -> str | None:
        """How a file that is there differs from its record, or from what the publisher says where there is none."""
        path = self.folder / remote.name
        known = self.ledger.files.get(remote.name)
        size_bytes = path.stat().st_size
        if known is None and announced_bytes not in (None, size_bytes):
            return f"it has {size_bytes:,} bytes, the publisher's has {announced_bytes:,}"
        if known is None and remote.checksum is not None:
            algorithm, _, published = remote.checksum.partition(":")
            if pooch.file_hash(str(path), alg=algorithm) != published:
                return f"it does not have the publisher's checksum {remote.checksum}"
        if known is not None and known.size_bytes != size_bytes:
            return f"it has {size_bytes:,} bytes, not {known.size_bytes:,}"
        sha256 = digest_of_file(path)
        if known is not None and known.sha256 != sha256:
            return f"its sha256 is {sha256}, not {known.sha256}"
        if known is None:
            self._record(remote, sha256, "found")
        return None

    def _get(self, remote: RemoteFile, show: Callable[[int], None] | None = None) -> None:
        """Download one file through pooch, which checks the publisher's checksum; record it; put it in its place."""
        key = _flat(remote.name)
        cache = pooch.create(path=self.work, base_url="", registry={key: remote.checksum}, urls={key: remote.url})
        try:
            arrived = Path(cache.fetch(key, downloader=self._downloader(key, show)))
        except FetchError:
            raise
        except ValueError as error:  # of pooch: the checksum, with both sums
            raise FetchError(f"{remote.url}: {error}") from error
        path = self.folder / remote.name
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = digest_of_file(arrived)
        arrived.replace(path)
        self._record(remote, sha256, "downloaded")
        self.result.downloaded.append(remote.name)

    def _record(self, remote: RemoteFile, sha256: str, how: Literal["downloaded", "found"]) -> None:
        size_bytes = (self.folder / remote.name).stat().st_size
        self.ledger.files[remote.name] = LedgerFile(
            url=remote.url, sha256=sha256, size_bytes=size_bytes, recorded=datetime.now(UTC), how=how
        )

    def _fetch_images(self, images: ListedImages) -> None:
        """Each image that the table names, over few connections at once."""
        remotes, self.result.refused = _listed(self.folder / images.table, images, self._address(images.base_url))
        there = [remote for remote in remotes if (self.folder / remote.name).is_file()]
        if len(there) < len(remotes):
            present_bytes = sum((self.folder / remote.name).stat().st_size for remote in there)
            needed = max(0, images.about_bytes - present_bytes) * (len(remotes) - len(there)) // len(remotes)
            require_space(self.folder, needed, f"downloading the images of {self.download.title}")
        failures: list[str] = []
        executor = ThreadPoolExecutor(self.num_connections, thread_name_prefix="fetch")
        try:
            futures = [executor.submit(self._fetch_image, remote) for remote in remotes]
            for done, future in enumerate(as_completed(futures), 1):
                failures += filter(None, [future.result()])
                if len(failures) >= MAX_FAILURES:
                    break
                if done % _SAVE_EVERY == 0:
                    self._save()
                self.on_progress(done, len(remotes))
        finally:
            executor.shutdown(cancel_futures=True)
        if failures:
            shown = "; ".join(failures[:3])
            raise FetchError(f"{len(failures)} images of {self.download.title} could not be had, the first: {shown}")

    def _fetch_image(self, remote: RemoteFile) -> str | None:
        """Get or check one image; returns why it cannot be had, if so."""
        try:
            if self._is_wanted(remote, None):
                self._get(remote)
        except NotThereError:
            self.result.absent.append(remote.name)
        except FetchError as error:
            return str(error)
        return None

    @property
    def _session(self) -> requests.Session:
        """The session of this thread."""
        if not hasattr(self._threads, "session"):
            self._threads.session = new_session()
        session: requests.Session = self._threads.session
        return session

    def _downloader(self, key: str, show: Callable[[int], None] | None = None) -> ResumingDownloader:
        return ResumingDownloader(self.work / f"{key}.part", self._session, show)

    def _address(self, url: str) -> str:
        if self.mirror is None:
            return url
        there, wanted = urlsplit(self.mirror), urlsplit(url)
        return urlunsplit((there.scheme, there.netloc, wanted.path, wanted.query, ""))

    def _save(self) -> None:
        files = dict(self.ledger.files)  # threads add to it
        write_json(self.folder / LEDGER, self.ledger.model_copy(update={"files": files}).model_dump(mode="json"))


def _flat(name: str) -> str:
    """A name for the working folder, which has no subfolders."""
    return name.replace("/", "_")


def _listed(table: Path, images: ListedImages, base_url: str) -> tuple[list[RemoteFile], list[str]]:
    """The images that a table names, each once, and the cells that are no path of an image."""
    found: dict[str, RemoteFile] = {}
    refused: dict[str, None] = {}
    for cell in _cells(table, images.columns):
        matched = re.fullmatch(images.path_pattern, cell)
        if matched is None:
            refused[cell[:200]] = None
        else:
            found[matched["name"]] = RemoteFile(base_url + cell, matched["name"])
    return list(found.values()), list(refused)


def _cells(table: Path, columns: Sequence[str]) -> Iterator[str]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows: csv.DictReader[str] = csv.DictReader(file)
            missing = [name for name in columns if name not in (rows.fieldnames or [])]
            if missing:
                raise FetchError(f"{table} has no column {', '.join(missing)}; remove it and fetch it again")
            for row in rows:
                yield from filter(None, ((row[name] or "").strip() for name in columns))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FetchError(f"{table} is not a table ({error}); remove it and fetch it again") from error
