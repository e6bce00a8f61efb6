"""Fetching, against a real server on this machine that misbehaves in every way a server does."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.sources.fetch import transfer
from derm_pipeline.sources.fetch.downloads import (
    DOWNLOADS,
    Application,
    Dataverse,
    Direct,
    ListedImages,
    RemoteFile,
    how_to_get,
)
from derm_pipeline.sources.fetch.fetch import WORK, LicenceError, fetch
from derm_pipeline.sources.fetch.ledger import LEDGER, read_ledger
from derm_pipeline.sources.fetch.listings import list_dataverse
from derm_pipeline.sources.fetch.transfer import FetchError, NotThereError, ResumingDownloader, new_session

LICENCE = "CC BY-NC 4.0"


def content(size: int = 300_000) -> bytes:
    return np.random.default_rng().bytes(size)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@dataclass
class Seen:
    """One request and what was answered."""

    method: str
    path: str
    range: str | None
    status: int = 0
    num_bytes: int = 0


@dataclass
class Site:
    """A server's files, and how it misbehaves: for each path a list of faults, one taken by each GET."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    heads: bool = True
    base: str = ""

    def put(self, path: str, body: bytes, *faults: str) -> bytes:
        self.files[path] = body
        self.etags[path] = f'"{sha256(body)[:12]}"'
        self.faults[path] = list(faults)
        return body

    def gets(self, path: str | None = None) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "GET" and path in (None, seen.path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802
        self.site.seen.append(Seen("HEAD", self.path, None))
        body = self.site.files.get(self.path)
        self.send_response(200 if body is not None and self.site.heads else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()

    def do_GET(self) -> None:  # noqa: N802
        self.seen = Seen("GET", self.path, self.headers.get("Range"))
        self.site.seen.append(self.seen)
        faults = self.site.faults.get(self.path, [])
        fault, _, value = (faults.pop(0) if faults else "").partition(" ")
        getattr(self, f"answer_{fault or 'file'}")(value)

    def answer_status(self, value: str) -> None:
        code, _, wait = value.partition(" ")
        self.start(int(code), 0, {"Retry-After": wait} if wait else {})

    def answer_redirect(self, target: str) -> None:
        self.start(302, 0, {"Location": target})

    def answer_html(self, _: str) -> None:
        page = b"<html>please log in</html>"
        self.start(200, len(page), {"Content-Type": "text/html; charset=utf-8"})
        self.write(page)

    def answer_empty(self, _: str) -> None:
        self.start(200, 0)

    def answer_file(self, _: str, *, limit: int | None = None, ranges: bool = True, extra: int = 0) -> None:
        body = self.site.files.get(self.path)
        if body is None:
            return self.start(404, 0)
        etag = self.site.etags[self.path]
        headers = {"ETag": etag} if etag else {}
        headers |= self.site.headers.get(self.path, {})
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found and ranges and self.headers.get("If-Range") in (None, etag, headers.get("Last-Modified")):
            start = int(found[1])
            if start >= len(body):
                return self.start(416, 0, headers | {"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.start(206, len(body) - start, headers)
            body = body[start:]
        else:
            self.start(200, len(body) + extra, headers)
        self.write(body[:limit])
        if limit is not None or extra:
            self.close_connection = True
        return None

    def answer_cut(self, value: str) -> None:
        """The connection ends after so many bytes."""
        self.answer_file("", limit=int(value))

    def answer_whole(self, _: str) -> None:
        """Range is not understood."""
        self.answer_file("", ranges=False)

    def answer_promise(self, value: str) -> None:
        """Content-Length says more than there is."""
        self.answer_file("", extra=int(value))

    def answer_endless(self, _: str) -> None:
        """No Content-Length, and no end."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        except OSError:
            self.close_connection = True

    def answer_chunked(self, _: str) -> None:
        body = self.site.files[self.path]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")

    def answer_other(self, value: str) -> None:
        """Another range than the one asked for."""
        body = self.site.files[self.path]
        self.start(206, 10, {"ETag": self.site.etags[self.path], "Content-Range": f"bytes {value}/{len(body)}"})
        self.write(body[:10])

    def answer_slow(self, value: str) -> None:
        """Half of it, a pause of so many seconds, the rest."""
        body = self.site.files[self.path]
        self.start(200, len(body), {"ETag": self.site.etags[self.path]})
        self.write(body[: len(body) // 2])
        time.sleep(float(value))
        try:
            self.write(body[len(body) // 2 :])
        except OSError:
            self.close_connection = True

    def start(self, code: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.seen.status = code
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def write(self, body: bytes) -> None:
        for start in range(0, len(body), 10_000):
            chunk = body[start : start + 10_000]
            self.wfile.write(chunk)
            self.seen.num_bytes += len(chunk)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": site}))
    server.daemon_threads = True
    site.base = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(transfer, "WAIT_S", 0.001)
    monkeypatch.setattr(transfer, "TIMEOUT_S", (2.0, 2.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "raw" / "source"


def direct(*names: str, **values: object) -> Direct:
    """A download of files at addresses that only the mirror makes reachable."""
    files = tuple(RemoteFile(f"https://publisher.invalid/data/{name}", name) for name in names)
    return Direct(title="Some Dataset", homepage="https://publisher.invalid", files=files, **values)


def get(site: Site, download: Direct, folder: Path, **values: object):
    return fetch(download, folder, licence=LICENCE, accept_licence=True, mirror=site.base, **values)


def zipped(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return packed.getvalue()


def test_files_are_downloaded_recorded_and_unpacked(site, folder):
    members = {f"{number}.jpg": content(2000) for number in range(20)}
    table, archive = site.put("/data/table.csv", content()), site.put("/data/images.zip", zipped(members))
    result = get(site, direct("table.csv", "images.zip"), folder)
    assert (result.downloaded, result.verified, result.unpacked) == (["table.csv", "images.zip"], [], ["images"])
    assert (folder / "table.csv").read_bytes() == table
    assert {path.name: path.read_bytes() for path in (folder / "images").iterdir()} == members
    ledger = read_ledger(folder)
    assert {name: known.sha256 for name, known in ledger.files.items()} == {
        "table.csv": sha256(table),
        "images.zip": sha256(archive),
    }
    assert ledger.files["table.csv"].size_bytes == len(table)
    assert [known.text for known in ledger.licences] == [LICENCE]
    assert {path.name for path in folder.iterdir()} == {"table.csv", "images.zip", "images", LEDGER}


def test_unpacking_can_be_left_out(site, folder):
    site.put("/data/images.zip", zipped({"1.jpg": content()}))
    assert get(site, direct("images.zip"), folder, unpack=False).unpacked == []
    assert not (folder / "images").exists()


def test_fetching_again_checks_and_downloads_nothing(site, folder):
    site.put("/data/a.csv", content())
    site.put("/data/images.zip", zipped({"1.jpg": content()}))
    download = direct("a.csv", "images.zip")
    get(site, download, folder)
    before = read_ledger(folder)
    site.seen.clear()
    result = get(site, download, folder)
    assert (result.downloaded, result.verified, result.unpacked) == ([], ["a.csv", "images.zip"], [])
    assert site.gets() == []
    assert read_ledger(folder) == before


def test_the_licence_is_shown_and_accepted_once(site, folder):
    site.put("/data/a.csv", content())
    download = direct("a.csv")
    with pytest.raises(LicenceError, match=r"Some Dataset .* licence: CC BY-NC 4\.0 .* --accept-licence"):
        fetch(download, folder, licence=LICENCE, mirror=site.base)
    assert site.seen == []
    assert not folder.exists()
    get(site, download, folder)
    fetch(download, folder, licence=LICENCE, mirror=site.base)
    with pytest.raises(LicenceError, match="other terms"):
        fetch(download, folder, licence="other terms", mirror=site.base)
    fetch(download, folder, licence="other terms", accept_licence=True, mirror=site.base)
    assert [known.text for known in read_ledger(folder).licences] == [LICENCE, "other terms"]
    accepted = json.loads((folder / LEDGER).read_text())["licences"][0]["accepted"]
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", accepted)


@pytest.mark.parametrize("cuts", [[100_000], [100_000, 50_000, 1], [0, 299_999]])
def test_an_interrupted_transfer_goes_on_where_it_stopped(site, folder, cuts):
    body = site.put("/data/a.bin", content(), *(f"cut {cut}" for cut in cuts))
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    gets = site.gets()
    assert len(gets) == len(cuts) + 1
    assert sum(seen.num_bytes for seen in gets) < len(body) + len(cuts) * 140_000  # what lay in buffers comes twice
    assert any(seen.status == 206 for seen in gets) == (max(cuts) > 70_000)


def test_what_was_received_is_kept_for_the_next_fetch(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "NUM_TRIES", 1)
    body = site.put("/data/a.bin", content(), "cut 200000")
    with pytest.raises(FetchError, match=r"/data/a\.bin: the connection was lost.* kept"):
        get(site, direct("a.bin"), folder)
    kept = (folder / WORK / "a.bin.part").stat().st_size
    assert 100_000 < kept <= 200_000
    assert not (folder / "a.bin").exists()
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    assert site.gets()[-1].range == f"bytes={kept}-"
    assert site.gets()[-1].num_bytes == len(body) - kept
    assert not (folder / WORK).exists()


def test_a_server_without_ranges_starts_over(site, folder):
    body = site.put("/data/a.bin", content(), "cut 200000", "whole")
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    assert [seen.status for seen in site.gets()] == [200, 200]
    assert site.gets()[1].range is not None


def test_another_file_under_the_same_address_starts_over(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "NUM_TRIES", 1)
    site.put("/data/a.bin", content(), "cut 200000")
    with pytest.raises(FetchError):
        get(site, direct("a.bin"), folder)
    body = site.put("/data/a.bin", content(280_000))
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    assert site.gets()[-1].status == 200


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_mark_of_the_version_the_date_is_used_or_it_starts_over(site, folder, etag):
    body = site.put("/data/a.bin", content(), "cut 200000")
    dated = site.put("/data/b.bin", content(), "cut 200000")
    site.etags |= {"/data/a.bin": etag, "/data/b.bin": etag}
    site.headers["/data/b.bin"] = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    get(site, direct("a.bin", "b.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    assert (folder / "b.bin").read_bytes() == dated
    assert [seen.range is None for seen in site.gets("/data/a.bin")] == [True, True]
    assert [seen.status for seen in site.gets("/data/b.bin")] == [200, 206]


def test_a_partial_file_that_is_whole_is_taken_and_one_that_is_too_long_is_not(site, tmp_path):
    body = site.put("/a", content())
    for length, statuses in ((len(body), [416]), (len(body) + 5, [416, 200])):
        part = tmp_path / "a.part"
        part.write_bytes((body + b"extra")[:length])
        note = {"url": f"{site.base}/a", "validator": site.etags["/a"], "size_bytes": len(body)}
        (tmp_path / "a.part.json").write_text(json.dumps(note))
        site.seen.clear()
        ResumingDownloader(part, new_session())(f"{site.base}/a", tmp_path / "a", None)
        assert (tmp_path / "a").read_bytes() == body
        assert [seen.status for seen in site.gets()] == statuses
        assert not part.exists()


@pytest.mark.parametrize("note", ["", "{}", "[1]", '{"url": "elsewhere", "validator": "x", "size_bytes": 3}'])
def test_a_partial_file_of_unknown_origin_is_not_gone_on_with(site, tmp_path, note):
    body = site.put("/a", content())
    (tmp_path / "a.part").write_bytes(b"from somewhere else")
    (tmp_path / "a.part.json").write_text(note)
    ResumingDownloader(tmp_path / "a.part", new_session())(f"{site.base}/a", tmp_path / "a", None)
    assert (tmp_path / "a").read_bytes() == body
    assert site.gets()[0].range is None


@pytest.mark.parametrize("given", ["5-14", "0-9", "nonsense"])
def test_another_range_than_the_one_asked_for_is_not_appended(site, folder, given):
    body = site.put("/data/a.bin", content(), "cut 200000", f"other {given}")
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body


def test_a_server_that_is_busy_is_asked_again(site, folder):
    body = site.put("/data/a.bin", content(), "status 503", "status 429 0", "status 500")
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    assert len(site.gets()) == 4


def test_the_server_says_how_long_to_wait_and_it_is_bounded(site, folder, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    site.put("/data/a.bin", content(), "status 503 7", "status 503 999999", "status 503")
    get(site, direct("a.bin"), folder)
    assert waits[:2] == [7, transfer.MAX_WAIT_S]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("status 503", "answers 503 .*6 times in a row"),
        ("cut 0", "connection was lost"),
        ("promise 50", "lost|ended after|another range"),
    ],
)
def test_a_failure_that_stays_gives_up_after_some_tries(site, folder, fault, words):
    site.put("/data/a.bin", content(), *[fault] * 50)
    with pytest.raises(FetchError, match=words) as error:
        get(site, direct("a.bin"), folder)
    assert f"{site.base}/data/a.bin" in str(error.value)
    assert len(site.gets()) == transfer.NUM_TRIES
    assert not (folder / "a.bin").exists()


def test_progress_between_failures_is_not_giving_up(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", 10_000)
    body = site.put("/data/a.bin", content(2_000_000), *["cut 200000"] * 9)
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("status 404", r"has no such file \(404\)"),
        ("empty", r"the server sends an empty file"),
        ("status 403", r"refuses access \(403"),
        ("status 401", "asks for a login"),
        ("status 418", "does not give it"),
        ("html", "answers with a web page instead of the file"),
    ],
)
def test_a_file_that_cannot_be_had_is_said_at_once_with_its_address(site, folder, fault, words):
    site.put("/data/a.bin", content(), fault)
    with pytest.raises(FetchError, match=words) as error:
        get(site, direct("a.bin"), folder)
    assert f"{site.base}/data/a.bin" in str(error.value)
    assert isinstance(error.value, NotThereError) == ("404" in fault)
    assert len(site.gets()) == 1
    assert not (folder / "a.bin").exists()


def test_nobody_listening_is_said(folder, monkeypatch):
    monkeypatch.setattr(transfer, "NUM_TRIES", 2)
    with pytest.raises(FetchError, match="Connection refused"):
        fetch(direct("a.bin"), folder, licence=LICENCE, accept_licence=True, mirror="http://127.0.0.1:9")


def test_redirects_are_followed_to_web_addresses_only(site, folder):
    body = site.put("/elsewhere/b.bin", content())
    site.put("/data/a.bin", b"", f"redirect {site.base}/elsewhere/b.bin")
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    assert not (folder / "b.bin").exists()
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://x"):
        site.put("/data/c.bin", b"", f"redirect {target}")
        with pytest.raises(FetchError, match="not an address of the web"):
            get(site, direct("c.bin"), folder)
    site.put("/data/d.bin", b"", *["redirect /data/d.bin"] * 50)
    with pytest.raises(FetchError, match="redirects"):
        get(site, direct("d.bin"), folder)


def test_a_body_without_announced_length_is_taken_and_bounded(site, folder, monkeypatch):
    body = site.put("/data/a.bin", content(), "chunked")
    get(site, direct("a.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    monkeypatch.setattr(transfer, "MAX_UNANNOUNCED_BYTES", 1_000_000)
    site.put("/data/b.bin", b"", "endless")
    with pytest.raises(FetchError, match="sends more than the 1,000,000 bytes"):
        get(site, direct("b.bin"), folder)
    assert not (folder / "b.bin").exists()


def test_a_slow_body_is_waited_for_and_a_stalled_one_is_asked_for_again(site, folder, monkeypatch):
    body = site.put("/data/a.bin", content(), "slow 0.2")
    get(site, direct("a.bin"), folder)
    monkeypatch.setattr(transfer, "TIMEOUT_S", (2.0, 0.15))
    stalled = site.put("/data/b.bin", content(), "slow 0.6")
    get(site, direct("b.bin"), folder)
    assert (folder / "a.bin").read_bytes() == body
    assert (folder / "b.bin").read_bytes() == stalled
    assert [seen.status for seen in site.gets("/data/b.bin")] == [200, 206]


def with_checksum(name: str, checksum: str) -> Direct:
    return Direct(
        title="Some Dataset",
        homepage="https://publisher.invalid",
        files=(RemoteFile(f"https://publisher.invalid/data/{name}", name, checksum=checksum),),
    )


def test_the_publishers_checksum_is_held_to(site, folder):
    body = site.put("/data/a.bin", content())
    wrong = hashlib.md5(b"something else").hexdigest()
    with pytest.raises(FetchError, match=f"/data/a.bin: .*{wrong}.*{hashlib.md5(body).hexdigest()}"):
        get(site, with_checksum("a.bin", f"md5:{wrong}"), folder)
    assert not (folder / "a.bin").exists()
    assert read_ledger(folder).files == {}
    get(site, with_checksum("a.bin", f"md5:{hashlib.md5(body).hexdigest()}"), folder)
    assert (folder / "a.bin").read_bytes() == body


@pytest.mark.parametrize("damage", [lambda body: body[:-1], lambda body: body[:-1] + bytes([body[-1] ^ 1])])
def test_a_file_that_changed_is_named_kept_and_replaced_only_when_asked(site, folder, damage):
    body = site.put("/data/a.bin", content())
    site.put("/data/b.bin", content())
    download = direct("a.bin", "b.bin")
    get(site, direct("a.bin"), folder)
    (folder / "a.bin").write_bytes(damage(body))
    site.seen.clear()
    with pytest.raises(FetchError, match=r"a\.bin is not what was fetched: .*--replace-changed"):
        get(site, download, folder)
    assert (folder / "a.bin").read_bytes() == damage(body)
    assert site.gets() == []
    result = get(site, download, folder, replace_changed=True)
    assert result.downloaded == ["a.bin", "b.bin"]
    assert (folder / "a.bin").read_bytes() == body


def test_files_that_lay_there_before_are_recorded_as_found_unless_they_differ(site, folder):
    body = site.put("/data/a.bin", content())
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(body)
    assert get(site, direct("a.bin"), folder).verified == ["a.bin"]
    assert read_ledger(folder).files["a.bin"].how == "found"
    assert site.gets() == []
    site.put("/data/b.bin", content())
    (folder / "b.bin").write_bytes(b"cut short by hand")
    with pytest.raises(FetchError, match="it has 17 bytes, the publisher's has 300,000"):
        get(site, direct("b.bin"), folder)
    (folder / "b.bin").write_bytes(content())
    with pytest.raises(FetchError, match="does not have the publisher's checksum"):
        get(site, with_checksum("b.bin", f"md5:{hashlib.md5(site.files['/data/b.bin']).hexdigest()}"), folder)


def test_an_archive_removed_after_unpacking_is_not_downloaded_again(site, folder):
    site.put("/data/images.zip", zipped({"1.jpg": content()}))
    get(site, direct("images.zip"), folder)
    (folder / "images.zip").unlink()
    site.seen.clear()
    result = get(site, direct("images.zip"), folder)
    assert (result.unpacked_before, result.downloaded, site.gets()) == (["images.zip"], [], [])


def test_a_replaced_archive_says_that_its_folder_is_outdated(site, folder):
    site.put("/data/images.zip", zipped({"1.jpg": content()}))
    get(site, direct("images.zip"), folder)
    (folder / "images.zip").write_bytes(b"damaged")
    assert get(site, direct("images.zip"), folder, replace_changed=True).outdated_folders == ["images"]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("name", "times"), [("a.bin", 1), ("a.zip", 2)])
def test_too_little_space_is_said_before_anything_is_downloaded(site, folder, monkeypatch, name, times):
    body = zipped({"1.jpg": content(9_950_000)})
    site.put(f"/data/{name}", body)
    free = 100_000_000 + times * len(body)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free - 1))
    needed = {1: r"110\.0 MB", 2: r"119\.9 MB"}[times]
    with pytest.raises(ValueError, match=f"downloading Some Dataset needs {needed} and the disk of .* free"):
        get(site, direct(name), folder)
    assert site.gets() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    assert get(site, direct(name), folder).downloaded == [name]


def test_a_server_that_does_not_answer_head_is_held_to_the_announced_size(site, folder, monkeypatch):
    site.heads = False
    site.put("/data/a.bin", content())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 100_200_000))
    with pytest.raises(ValueError, match=r"downloading http.*/a\.bin needs 100\.3 MB"):
        get(site, direct("a.bin"), folder)


def test_progress_is_bytes_of_all_files(site, folder):
    for name in ("a.bin", "b.bin"):
        site.put(f"/data/{name}", content(), "cut 250000")
    seen: list[tuple[int, int]] = []
    get(site, direct("a.bin", "b.bin"), folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (600_000, 600_000)


def test_pooch_is_not_heard_and_keeps_its_voice(site, folder, capfd):
    logger = logging.getLogger("pooch")
    level = logger.level
    site.put("/data/a.bin", content())
    get(site, direct("a.bin"), folder)
    assert capfd.readouterr() == ("", "")
    assert logger.level == level


def test_the_downloader_is_one_of_pooch(site, tmp_path):
    import pooch

    body = site.put("/a.bin", content(), "cut 100000")
    downloader = ResumingDownloader(tmp_path / "a.part", new_session())
    path = pooch.retrieve(
        f"{site.base}/a.bin", f"sha256:{sha256(body)}", fname="a.bin", path=tmp_path, downloader=downloader
    )
    assert Path(path).read_bytes() == body
    assert downloader(f"{site.base}/a.bin", "", None, check_only=True)
    assert not downloader(f"{site.base}/other", "", None, check_only=True)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": 1}}', '{"licences": [], "files": {}, "more": 1}'])
def test_a_damaged_ledger_is_named(site, folder, text):
    folder.mkdir(parents=True)
    (folder / LEDGER).write_text(text)
    with pytest.raises(ValueError, match=r"\.fetched\.json does not say what was fetched .* remove it"):
        get(site, direct("a.bin"), folder)


def test_a_killed_fetch_goes_on_from_the_partial_file(site, folder):
    body = site.put("/data/a.bin", content(6_000_000), "slow 60")
    script = (
        "import sys; from pathlib import Path; from derm_pipeline.sources.fetch.fetch import fetch; "
        "from derm_pipeline.sources.fetch.downloads import Direct, RemoteFile; "
        "file = RemoteFile('https://publisher.invalid/data/a.bin', 'a.bin'); "
        "download = Direct('Some', 'home', (file,)); "
        "fetch(download, Path(sys.argv[1]), licence='x', accept_licence=True, mirror=sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), site.base])
    part = folder / WORK / "a.bin.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 2_500_000) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert fetch(direct("a.bin"), folder, licence="x", mirror=site.base).downloaded == ["a.bin"]
    assert (folder / "a.bin").read_bytes() == body
    assert site.gets()[-1].num_bytes == len(body) - kept
    assert {path.name for path in folder.iterdir()} == {"a.bin", LEDGER}


def test_of_two_at_once_one_downloads_and_the_other_finds_it(site, folder):
    site.put("/data/a.bin", content(), "slow 0.2")
    results = []
    threads = [threading.Thread(target=lambda: results.append(get(site, direct("a.bin"), folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(result.downloaded) for result in results) == [0, 1]
    assert len(site.gets()) == 1


LISTED = ListedImages(
    table="cases.csv",
    columns=("image_1_path", "image_2_path"),
    base_url="https://bucket.invalid/bucket/",
    path_pattern=r"dataset/(?P<name>images/-?\d{1,30}\.(png|jpg|jpeg))",
    about_bytes=1_000_000,
)


def put_images(site: Site, number: int, *extra_cells: str) -> dict[str, bytes]:
    images = {f"images/{n - 7}.png": content(5000) for n in range(number)}
    for name, body in images.items():
        site.put(f"/bucket/dataset/{name}", body)
    cells = [f"dataset/{name}" for name in images] + list(extra_cells)
    rows = [f"{n},{cell},{cells[n - 1] if n % 2 else ''}" for n, cell in enumerate(cells)]
    site.put("/data/cases.csv", ("\ufeffcase_id,image_1_path,image_2_path\n" + "\n".join(rows) + "\n").encode())
    return images


def test_images_that_a_table_lists_are_downloaded_each_once(site, folder):
    images = put_images(site, 40)
    seen: list[tuple[int, int]] = []
    result = get(site, direct("cases.csv", images=LISTED), folder, on_progress=lambda *both: seen.append(both))
    assert sorted(result.downloaded) == sorted([*images, "cases.csv"])
    assert {f"images/{path.name}": path.read_bytes() for path in (folder / "images").iterdir()} == images
    assert all(len(site.gets(f"/bucket/dataset/{name}")) == 1 for name in images)
    assert seen[-1] == (40, 40)
    assert read_ledger(folder).files.keys() == {*images, "cases.csv"}
    site.seen.clear()
    again = get(site, direct("cases.csv", images=LISTED), folder)
    assert (len(again.verified), site.gets()) == (41, [])
    (folder / "images" / "-7.png").write_bytes(content(5000))
    with pytest.raises(FetchError, match=r"1 images of Some Dataset .*images/-7\.png is not what was fetched"):
        get(site, direct("cases.csv", images=LISTED), folder)


def test_an_image_that_the_server_does_not_have_is_named_and_the_others_come(site, folder):
    images = put_images(site, 10, "dataset/images/99999.png")
    result = get(site, direct("cases.csv", images=LISTED), folder)
    assert result.absent == ["images/99999.png"]
    assert len(result.downloaded) == len(images) + 1


def test_paths_in_the_table_that_are_none_of_images_are_named_and_not_asked_for(site, folder):
    bad = ["../../etc/passwd", "dataset/images/../1.png", "dataset/images/1.sh", "http://evil.invalid/1.png"]
    images = put_images(site, 3, *bad)
    result = get(site, direct("cases.csv", images=LISTED), folder)
    assert sorted(result.refused) == sorted(bad)
    assert {seen.path for seen in site.gets()} == {"/data/cases.csv", *(f"/bucket/dataset/{name}" for name in images)}


def test_images_that_fail_are_named_after_the_others_came(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "NUM_TRIES", 2)
    images = put_images(site, 20)
    site.faults["/bucket/dataset/images/3.png"] = ["status 500"] * 2
    with pytest.raises(FetchError, match=r"1 images .*images/3\.png: the server answers 500"):
        get(site, direct("cases.csv", images=LISTED), folder)
    assert len(list((folder / "images").iterdir())) == len(images) - 1
    assert get(site, direct("cases.csv", images=LISTED), folder).downloaded == ["images/3.png"]


def test_a_server_that_fails_for_good_is_not_asked_for_every_image(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "NUM_TRIES", 1)
    images = put_images(site, 200)
    for name in images:
        site.faults[f"/bucket/dataset/{name}"] = ["status 500"] * 3
    with pytest.raises(FetchError, match="10 images"):
        get(site, direct("cases.csv", images=LISTED), folder)
    assert len(site.gets()) < 60


@pytest.mark.parametrize(("body", "words"), [(b"a,b\n1,2\n", "no column image_1_path"), (b"\xff\xfe", "not a table")])
def test_a_table_that_lists_no_images_is_an_error(site, folder, body, words):
    site.put("/data/cases.csv", body)
    with pytest.raises(FetchError, match=words):
        get(site, direct("cases.csv", images=LISTED), folder)


DATAVERSE = Dataverse("https://dataverse.invalid", "doi:10.1/X", {"part_1": "part_1.zip", "table": "table.csv"})
LISTING = "/api/datasets/:persistentId/?persistentId=doi:10.1/X"


def listing_of(*files: dict[str, object]) -> bytes:
    entries = [{"restricted": file.pop("restricted", False), "dataFile": file} for file in files]
    return json.dumps({"status": "OK", "data": {"latestVersion": {"files": entries}}}).encode()


def test_files_of_a_dataverse_are_found_by_name_and_checked(site, folder):
    archive = site.put("/api/access/datafile/11", zipped({"1.jpg": content()}))
    table = site.put("/api/access/datafile/12?format=original", b"image_id,dx\n")
    site.put("/api/access/datafile/12", b"image_id\tdx\n")
    md5 = {name: hashlib.md5(body).hexdigest() for name, body in (("zip", archive), ("table", table))}
    described = (
        {"id": 11, "filename": "part_1.zip", "filesize": len(archive), "md5": md5["zip"]},
        {"id": 12, "filename": "table.tab", "filesize": 3, "originalFileFormat": "text/csv", "md5": md5["table"]},
        {"id": 13, "filename": "other.zip", "filesize": 3, "md5": "0" * 32},
    )
    site.put(LISTING, listing_of(*described))
    download = Direct("Some Dataset", "home", dataverse=DATAVERSE)
    result = get(site, download, folder)
    assert (result.downloaded, result.unpacked) == (["part_1.zip", "table.csv"], ["part_1"])
    assert (folder / "table.csv").read_bytes() == table
    site.put("/api/access/datafile/11", archive[:-1] + b"!")
    (folder / "part_1.zip").unlink()
    shutil.rmtree(folder / "part_1")
    with pytest.raises(FetchError, match=md5["zip"]):
        get(site, download, folder)


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        (b"<html>", "not answer with a listing"),
        (b'{"status": "ERROR"}', "not answer with a listing"),
        (b'{"data": {"latestVersion": {"files": [{"dataFile": 3}]}}}', "not answer with a listing"),
        (listing_of({"id": 1, "filename": "table.tab"}), "lists no file part_1; files there: table"),
        (listing_of({"id": 1, "filename": "part_1.zip", "restricted": True}), "part_1.zip is restricted"),
        (listing_of({"id": "../x", "filename": "part_1.zip"}), "gives part_1.zip no number"),
    ],
)
def test_a_listing_that_does_not_serve_is_an_error(listing, words):
    with pytest.raises(ValueError, match=words):
        list_dataverse(DATAVERSE, lambda url: listing)


@pytest.mark.parametrize(
    ("described", "checksum"),
    [
        ({"md5": "A" * 32}, "md5:" + "a" * 32),
        ({"checksum": {"type": "SHA-256", "value": "b" * 64}}, "sha256:" + "b" * 64),
        ({"checksum": {"type": "CRC", "value": "b" * 64}}, None),
        ({"md5": "no sum"}, None),
        ({}, None),
    ],
)
def test_a_listing_gives_checksums_in_either_form(described, checksum):
    dataset = Dataverse("https://dataverse.invalid", "doi:10.1/X", {"a": "a.zip"})
    (remote,) = list_dataverse(dataset, lambda url: listing_of({"id": 1, "filename": "a.zip"} | described))
    assert remote.checksum == checksum


def test_a_dataset_on_application_says_where_to_apply(folder):
    with pytest.raises(ValueError, match=r"derm\.cs\.sfu\.ca.*\(1\).*\(2\).*release_v0\.zip"):
        fetch(DOWNLOADS["d7p"], folder, licence=LICENCE, accept_licence=True)
    assert not folder.exists()


def test_what_must_be_got_otherwise_is_in_the_result(site, folder):
    site.put("/data/a.csv", content())
    assert "ask the hosts" in get(site, direct("a.csv", missing="ask the hosts"), folder).still_missing


@pytest.mark.parametrize("name", sorted(DOWNLOADS))
def test_every_page_says_where_and_what(name):
    page, download = how_to_get(name), DOWNLOADS[name]
    assert download.homepage in page
    assert download.title in page
    if isinstance(download, Application):
        assert all(step in page for step in download.steps)
    else:
        assert f"derm fetch {name}" in page
        assert all(remote.url in page and remote.name in page for remote in download.files)


def test_a_source_that_is_not_downloaded_says_so():
    assert "your own" in how_to_get("imagefolder")


def test_addresses_and_paths_of_the_table_are_sound():
    for download in DOWNLOADS.values():
        if isinstance(download, Direct):
            for remote in download.files:
                assert remote.url.startswith("https://")
                assert re.fullmatch(r"[A-Za-z0-9][\w.-]*", remote.name)
                assert remote.url.endswith(remote.name)
            names = [remote.name for remote in download.files]
            assert len(set(names)) == len(names)


def test_importing_the_sources_does_not_import_pooch():
    script = (
        "import sys, derm_pipeline.sources, derm_pipeline.sources.fetch.downloads; "
        "assert not {'pooch', 'requests', 'torch'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
