"""What was fetched into a source's folder: `.fetched.json`, with the licence accepted and the sha256 of every file."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

LEDGER = ".fetched.json"


class LedgerFile(BaseModel):
    """One file as it was when it came."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    sha256: str
    size_bytes: int
    recorded: datetime
    how: Literal["downloaded", "found"]
    """Found: it lay there already when the source was first fetched."""


class AcceptedLicence(BaseModel):
    """A licence as it was shown, and when it was accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    accepted: datetime


class Ledger(BaseModel):
    """What `.fetched.json` holds."""

    model_config = ConfigDict(extra="forbid")

    licences: list[AcceptedLicence] = []
    files: dict[str, LedgerFile] = {}
    """By path in the source's folder."""


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a source's folder; an empty one where nothing was fetched.

    Raises:
        ValueError: the file is no such ledger.
    """
    path = folder / LEDGER
    if not path.is_file():
        return Ledger()
    try:
        return Ledger.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path} does not say what was fetched ({error.error_count()} fields are wrong); remove it, and what "
            "lies in the folder is recorded anew"
        ) from error
