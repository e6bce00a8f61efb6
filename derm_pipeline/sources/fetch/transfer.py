"""One file over HTTP, resumed where it was cut off: what pooch calls a downloader.

What is received is kept in a partial file, with what the server said of it in a note beside it, so that neither a reset
connection nor a killed process costs what was there. Imports requests and pooch: import this module only when fetching.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pooch
import requests

from derm_pipeline import __version__
from derm_pipeline.sources.fetch.archives import require_space

TIMEOUT_S = (15.0, 60.0)
"""Time-outs for connecting and for the next bytes."""
NUM_TRIES = 6
"""Failures in a row before giving up; one with at least `PROGRESS_BYTES` received does not count."""
PROGRESS_BYTES = 1 << 20
WAIT_S = 1.0
"""The first pause; each following one is twice as long, unless the server says how long."""
MAX_WAIT_S = 60.0
MAX_UNANNOUNCED_BYTES = 1_000_000_000
"""What is taken at most of a body whose length the server does not announce."""

_CHUNK = 1 << 16
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # status codes that may be better in a moment
_REFUSED = {
    401: "asks for a login",
    403: "refuses access",
    404: "has no such file",
    410: "has no such file any more",
    451: "must not give it out",
}


class FetchError(ValueError):
    """A file that cannot be had; the message names its address and why."""


class NotThereError(FetchError):
    """The server has no such file."""


class _Passing(Exception):  # noqa: N818  never leaves this module
    """Something that may go better at the next try."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


_MAY_PASS = (_Passing, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


@dataclass(frozen=True)
class _Note:
    """What is known of the file that a partial file is the beginning of."""

    url: str
    validator: str
    """Strong ETag or Last-Modified, for If-Range."""
    size_bytes: int | None


def new_session() -> requests.Session:
    """A session for one thread: it follows few redirects, and none from https to http."""
    session = requests.Session()
    session.max_redirects = 8
    session.headers["User-Agent"] = f"derm_pipeline/{__version__} pooch/{pooch.__version__}"
    session.headers["Accept-Encoding"] = "identity"  # lengths and ranges are those of the file itself
    session.hooks["response"].append(_refuse_downgrade)
    return session


def _refuse_downgrade(response: requests.Response, **_: Any) -> None:
    target = response.headers.get("Location", "") if response.is_redirect else ""
    if response.url.startswith("https:") and target.startswith("http:"):
        raise FetchError(f"{response.url} redirects from https to {target}, which is not followed")
    if re.match(r"[a-zA-Z][\w+.-]*:", target) and not target.startswith(("http:", "https:")):
        raise FetchError(f"{response.url} redirects to {target[:200]}, which is not an address of the web")


def announced_size(session: requests.Session, url: str) -> int | None:
    """Bytes that a HEAD request announces, or None where it gets no such answer (the download then says why)."""
    try:
        with session.head(url, timeout=TIMEOUT_S, allow_redirects=True) as response:
            return _length(response) if response.status_code == 200 else None
    except requests.RequestException:
        return None


class ResumingDownloader:
    """A downloader for pooch that goes on where the last one stopped.

    Args:
        part: the partial file; its note lies beside it as `<part>.json`. Both are gone when the file is complete.
        session: from `new_session`.
        on_bytes: called with the number of bytes that are there now.
    """

    def __init__(
        self,
        part: Path,
        session: requests.Session,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.part = part
        self.session = session
        self.on_bytes = on_bytes or (lambda num_bytes: None)

    def __call__(self, url: str, output_file: str | Path, pooch: object, check_only: bool = False) -> bool | None:  # noqa: ARG002, F811
        """Download `url` to `output_file`, which appears when it is complete.

        Raises:
            FetchError: it cannot be had, now or ever; what was received is kept where it can be gone on with.
        """
        if check_only:
            return announced_size(self.session, url) is not None
        num_failures = 0
        while True:
            before = self._num_received()
            try:
                self._transfer(url)
                break
            except _MAY_PASS as error:
                progressed = self._num_received() - before >= PROGRESS_BYTES
                num_failures = 1 if progressed else num_failures + 1
                if num_failures >= NUM_TRIES:
                    why = f"{_reason(error)}, {num_failures} times in a row"
                    raise FetchError(f"{url}: {why}; try again later, what was received is kept") from error
                self._pause(num_failures, error)
            except requests.RequestException as error:
                raise FetchError(f"{url}: {_reason(error)}") from error
        self.part.replace(output_file)
        self._note_path.unlink(missing_ok=True)
        return None

    @property
    def _note_path(self) -> Path:
        return self.part.with_name(f"{self.part.name}.json")

    def _num_received(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _pause(self, num_failures: int, error: Exception) -> None:
        asked_s = error.wait_s if isinstance(error, _Passing) else None
        time.sleep(min(MAX_WAIT_S, asked_s if asked_s is not None else WAIT_S * 2 ** (num_failures - 1)))

    def _transfer(self, url: str) -> None:
        """One request; returns when the partial file is complete."""
        note = self._read_note(url)
        offset = self._num_received() if note is not None else 0
        headers = {}
        if note is not None and offset:
            headers = {"Range": f"bytes={offset}-", "If-Range": note.validator}
        with self.session.get(url, headers=headers, timeout=TIMEOUT_S, stream=True) as response:
            if response.status_code == 416 and offset:
                if _range_total(response) != offset:
                    self._forget()
                    raise _Passing("the server has another file than the one begun", 0)
                return
            _check_status(url, response)
            if response.status_code == 206:
                self._check_range(response, offset, note)
            else:
                offset = 0
            self._receive(url, response, offset)

    def _check_range(self, response: requests.Response, offset: int, note: _Note | None) -> None:
        start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        total = _range_total(response)
        same = note is not None and (note.size_bytes is None or total is None or total == note.size_bytes)
        if start is None or int(start[1]) != offset or not same:
            self._forget()
            raise _Passing("the server sent another range than the one asked for", 0)

    def _receive(self, url: str, response: requests.Response, offset: int) -> None:
        length = _length(response)
        total = None if length is None else offset + length
        if length is not None:
            require_space(self.part.parent, length, f"downloading {url}")
        if offset == 0:
            self._begin(url, response, total)
        num_bytes = offset
        limit = total if total is not None else MAX_UNANNOUNCED_BYTES
        with self.part.open("ab" if offset else "wb") as file:
            for chunk in response.iter_content(_CHUNK):
                num_bytes += len(chunk)
                if num_bytes > limit:
                    raise FetchError(f"{url}: the server sends more than the {limit:,} bytes that are allowed")
                file.write(chunk)
                self.on_bytes(num_bytes)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and num_bytes < total:
            raise _Passing(f"the connection ended after {num_bytes:,} of {total:,} bytes")
        if num_bytes == 0:  # it would be recorded, and be right ever after
            self._forget()
            raise FetchError(f"{url}: the server sends an empty file")

    def _begin(self, url: str, response: requests.Response, total: int | None) -> None:
        """Start over, and note what makes it safe to go on later."""
        self._forget()
        etag = response.headers.get("ETag", "")
        strong = etag if etag.startswith('"') else ""
        validator = strong or response.headers.get("Last-Modified", "")
        if validator:  # without one nobody can tell whether the rest is the rest of the same file
            self._note_path.write_text(json.dumps(asdict(_Note(url, validator, total))))

    def _forget(self) -> None:
        self._note_path.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def _read_note(self, url: str) -> _Note | None:
        try:
            note = _Note(**json.loads(self._note_path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return note if note.url == url and note.validator.isprintable() else None


def _check_status(url: str, response: requests.Response) -> None:
    code = response.status_code
    if code in _PASSING:
        raise _Passing(f"the server answers {code} {response.reason}", _asked_wait(response))
    if code in (404, 410):
        raise NotThereError(f"{url}: the server {_REFUSED[code]} ({code})")
    if code not in (200, 206):
        raise FetchError(f"{url}: the server {_REFUSED.get(code, 'does not give it')} ({code} {response.reason})")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"{url}: the server sends it packed in a way that was not asked for")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise FetchError(f"{url}: the server answers with a web page instead of the file; open the address to see it")


def _asked_wait(response: requests.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else None


def _length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    chunked = "chunked" in response.headers.get("Transfer-Encoding", "")
    return int(text) if re.fullmatch(r"\d{1,18}", text) and not chunked else None


def _range_total(response: requests.Response) -> int | None:
    found = re.fullmatch(r"bytes .*/(\d{1,18})", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        inner = re.search(
            r"(Connection refused|Name or service not known|Temporary failure in name resolution)", str(error)
        )
        return f"the connection failed ({inner[1]})" if inner else "the connection was lost"
    return str(error)
