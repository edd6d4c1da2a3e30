"""Whose ranks may run now, where several processes run tests (`WORKERS=2`): one group's at a time.

What needs no ranks waits for nobody, and so do shared ranks that are asked for nothing. The turn is
a lock on this file, which ends with the process that has it.

Not done here: a turn has no time limit, because what is done in one has.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = os.open(__file__, os.O_RDONLY)
_within: list[None] = []  # of turns in this process, of all its threads
_mutex = threading.Lock()


@contextmanager
def turn() -> Iterator[None]:
    """Waits until no other group of ranks runs. A turn within a turn is the same one.

    The wait does not count for pytest's time-out, but it does for what is timed around it: a test
    about seconds takes them in its ranks.
    """
    with _mutex:
        if not _within:
            _take()
        _within.append(None)
    try:
        yield
    finally:
        with _mutex:
            _within.pop()
            if not _within:
                fcntl.flock(_LOCK, fcntl.LOCK_UN)


def _take() -> None:
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's
    try:
        fcntl.flock(_LOCK, fcntl.LOCK_EX)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
