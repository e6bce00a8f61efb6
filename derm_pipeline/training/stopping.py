"""Stopping at a signal, between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """A function that says whether one of these signals (SIGTERM where none is named) has come, for `stop_when`.

    A scheduler that takes a machine back (Slurm, Kubernetes, a spot market) sends SIGTERM and kills half a minute
    later. The handler only notes it; the training sees it after the step that runs, saves and raises `Interrupted`.
    The previous handlers are back in place afterwards. Python runs handlers in the main thread only: from another
    thread nothing is installed and the function never says yes.
    """
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        came.set()

    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    previous = {number: signal.signal(number, note) for number in signals or (signal.SIGTERM,)}
    try:
        yield came.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
