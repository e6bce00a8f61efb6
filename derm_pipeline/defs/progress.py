"""How long work shows that it goes on: a hook that the command line and the assets set in their own way."""

from __future__ import annotations

import time
from collections.abc import Callable

Show = Callable[[str, int, int, str], None]
"""(stage, done, total, note); called as often as the library likes."""


class Progress:
    """Hands a stage its callbacks, and passes what they say on."""

    def __init__(self, show: Show, stage: str) -> None:
        self._show, self._stage = show, stage

    def count(self, done: int, total: int) -> None:
        """For stages that count things."""
        self._show(self._stage, done, total, "")

    def step(self, done: int, total: int, loss: float) -> None:
        """For trainings."""
        self._show(self._stage, done, total, f"loss {loss:.4f}")

    def named(self, done: int, total: int, note: str) -> None:
        """For stages that name what they finished."""
        self._show(self._stage, done, total, note)


def logging_show(log: Callable[[str], None], every_seconds: float = 10.0) -> Show:
    """A hook that logs a line now and then."""
    last: dict[str, float] = {}

    def show(stage: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done == total or now - last.setdefault(stage, now) >= every_seconds:
            last[stage] = now
            log(f"{stage}: {done:,} of {total:,}{', ' + note if note else ''}")

    return show
