"""What a Dataverse repository says of a dataset's files: where each is, how large, and with which checksum.

API: https://guides.dataverse.org/en/latest/api/native-api.html and .../dataaccess.html. A table is offered both as it
was uploaded and in a form of Dataverse's own (`.tab`), which is what comes unless `format=original` is asked for, while
the checksum is that of the upload (IQSS/dataverse#5321). So the original is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from derm_pipeline.sources.fetch.downloads import Dataverse, RemoteFile

_ALGORITHMS = {"MD5": "md5", "SHA-1": "sha1", "SHA-256": "sha256", "SHA-512": "sha512"}


def list_dataverse(dataset: Dataverse, get: Callable[[str], bytes]) -> list[RemoteFile]:
    """The dataset's files that are wanted, in the order of `names`.

    Args:
        dataset: where, and which files.
        get: the content of an address.

    Raises:
        ValueError: the answer is no listing, or a file is not in it or is not given to everybody.
    """
    url = f"{dataset.server}/api/datasets/:persistentId/?persistentId={dataset.doi}"
    entries = _entries(url, get(url))
    found = []
    for name, path in dataset.names.items():
        if name not in entries:
            there = ", ".join(sorted(entries))[:500] or "none"
            raise ValueError(f"{url} lists no file {name}; files there: {there}")
        found.append(_remote(url, dataset, entries[name], path))
    return found


def _entries(url: str, content: bytes) -> dict[str, Mapping[str, Any]]:
    """The listed files by name without suffix."""
    try:
        files = json.loads(content)["data"]["latestVersion"]["files"]
        return {PurePosixPath(entry["dataFile"]["filename"]).stem: entry for entry in files}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{url} does not answer with a listing of files ({type(error).__name__}: {error})") from error


def _remote(url: str, dataset: Dataverse, entry: Mapping[str, Any], path: str) -> RemoteFile:
    described = entry["dataFile"]
    if entry.get("restricted"):
        raise ValueError(f"{url}: {described['filename']} is restricted now; ask for it at its page")
    number = described.get("id")
    if not isinstance(number, int):
        raise ValueError(f"{url} gives {described['filename']} no number")
    is_table = "originalFileFormat" in described or described["filename"].endswith(".tab")
    size_bytes = described.get("originalFileSize" if is_table else "filesize")
    return RemoteFile(
        url=f"{dataset.server}/api/access/datafile/{number}{'?format=original' if is_table else ''}",
        name=path,
        size_bytes=size_bytes if isinstance(size_bytes, int) and size_bytes > 0 else None,
        checksum=_checksum(described),
    )


def _checksum(described: Mapping[str, Any]) -> str | None:
    kind, value = "MD5", described.get("md5")
    if value is None and isinstance(described.get("checksum"), dict):
        kind, value = described["checksum"].get("type"), described["checksum"].get("value")
    if kind not in _ALGORITHMS or not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{32,128}", value):
        return None
    return f"{_ALGORITHMS[kind]}:{value.lower()}"
