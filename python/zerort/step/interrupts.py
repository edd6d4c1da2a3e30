"""Ctrl-C between a vote and what it decides: it waits until all ranks have done that.

Behind the vote every rank knows that the step is applied, and each waits for the others' shards. An
interrupt that broke one rank off there would leave its peers in a collective until the time-out.

What it guarantees: within `held` the handler of SIGINT does not run; `Held.run` runs it afterwards,
as often as the signal came, or the end of `held` does where an exception leaves it. What it does
not do: it holds up nothing else, such as an exception that another handler raises; and outside the
main thread, or where SIGINT has no handler of Python's, it does nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Held", "held"]


class Held:
    """Signals that have come meanwhile."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler
        self._came: list[tuple[int, FrameType | None]] = []

    def note(self, number: int, frame: FrameType | None) -> None:
        """One has come."""
        self._came.append((number, frame))

    def run(self) -> None:
        """Lets the handler have what has come. Raises what it raises, `KeyboardInterrupt` unless
        the user has set another.
        """
        while self._came:
            self._handler(*self._came.pop(0))


@contextmanager
def held() -> Iterator[Held]:
    """Within, SIGINT is kept for `Held.run`."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield Held(lambda *_: None)
        return
    kept = Held(handler)
    signal.signal(signal.SIGINT, kept.note)
    try:
        yield kept
    except BaseException:
        signal.signal(signal.SIGINT, handler)
        kept.run()
        raise
    signal.signal(signal.SIGINT, handler)
