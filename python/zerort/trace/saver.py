"""Writes a trace while it is recorded, so that a process that is killed leaves most of it.

What it guarantees: the thread that records is held up by the taking of a snapshot alone, some ns an
event; a write starts `EVERY` seconds behind the one before at the earliest, and later where it
takes long, so that writing takes at most a fiftieth of a core; there is one at a time, and none
behind `join`. What it does not do: it raises and warns of nothing, which the last write does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

__all__ = ["Saver"]

EVERY = 10.0
"""Seconds."""
_SHARE = 50
"""Times as long as a write takes passes before the next."""


class Snapshot(Protocol):
    """What has been recorded up to a moment."""

    def write(self, path: str, /) -> None:
        """Raises `OSError`."""


class Saver:
    """Of one file; `saved` hears on the thread of each write when it began and ended, in ns of
    `time.perf_counter_ns`.
    """

    def __init__(self, path: str, saved: Callable[[int, int], None]) -> None:
        self._path = path
        self._saved = saved
        self._due = time.monotonic() + EVERY
        self._thread: threading.Thread | None = None

    def look(self, take: Callable[[], Snapshot]) -> None:
        """Takes a snapshot and has it written, where that is due."""
        if self._thread is not None and self._thread.is_alive():
            return
        if time.monotonic() < self._due:  # asked for behind the thread, whose end puts it off
            return
        self._due = time.monotonic() + EVERY
        # not a daemon: one that comes back into an interpreter that is being taken down aborts it
        self._thread = threading.Thread(target=self._write, args=(take(),), name="zerort-trace")
        with suppress(RuntimeError):  # no thread to be had: the next time
            self._thread.start()

    def join(self) -> None:
        """What is being written is in place."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _write(self, snapshot: Snapshot) -> None:
        begun = time.perf_counter_ns()
        with suppress(OSError):
            snapshot.write(self._path)
        ended = time.perf_counter_ns()
        self._due = time.monotonic() + max(EVERY, _SHARE * (ended - begun) / 1e9)
        self._saved(begun, ended)
