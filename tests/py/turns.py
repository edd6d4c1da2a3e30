"""Whose ranks may run now, where several processes run tests (`WORKERS=2`): two ranks at a time, of
one group or of two that have one each. A larger group runs alone.

What needs no ranks waits for nobody, and so do shared ranks that are asked for nothing. A turn is
locks on files, which end with the process that has them.

Not done here: a turn has no time limit, because what is done in one has.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE = Path(__file__)
_PLACES = [os.open(_HERE.with_name(name), os.O_RDONLY) for name in (_HERE.name, "ranks.py")]
_within: list[None] = []  # of turns in this process, of all its threads
_mutex = threading.Lock()


@contextmanager
def turn(ranks: int = 2) -> Iterator[None]:
    """Waits until there is room for a group of so many ranks. A turn within a turn is the same one.

    The wait does not count for pytest's time-out, but it does for what is timed around it: a test
    about seconds takes them in its ranks.
    """
    with _mutex:
        if not _within:
            _take(ranks)
        _within.append(None)
    try:
        yield
    finally:
        with _mutex:
            _within.pop()
            if not _within:
                for place in _PLACES:
                    fcntl.flock(place, fcntl.LOCK_UN)


def _take(ranks: int) -> None:
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's
    try:
        if ranks == 1:
            _take_any()
        else:
            # whoever waits for the second place has the first: two never wait for each other
            for place in _PLACES:
                fcntl.flock(place, fcntl.LOCK_EX)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)


def _take_any() -> None:
    for place in _PLACES:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return
    fcntl.flock(_PLACES[-1], fcntl.LOCK_EX)
