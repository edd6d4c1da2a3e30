"""How much of a processor a thread takes that works beside training.

What it guarantees: where others want the processor, work takes at most `SHARE` of it, and at least
about that much, so that it costs training little and still comes to an end; where nobody does, or
from `hurry` on, it never rests. What it does not do: it interrupts nothing, `rest` is called
between short pieces of work.

A thread of a low priority would do neither. It may have the interpreter's lock while it waits for a
processor, and training then waits as long; and on processors that are all busy Linux's lowest gets
a three-hundredth of one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from zerort.platforms import HERE

__all__ = ["SHARE", "Pace"]

SHARE = 0.1
"""Of a processor that others want."""
_PIECE = 0.02
"""Seconds of work before it is asked who wants the processor: some slices of the scheduler's."""
_WANTED = 0.1
"""Of the time that work took, what it has waited for a processor where others want it."""


@dataclass
class Pace:
    """Of one thread."""

    _hurried: threading.Event = field(default_factory=threading.Event)
    _worked: float | None = None
    """Processor time of the thread when it rested last."""
    _waited: float = 0.0
    """What it had waited for a processor then."""

    def hurry(self) -> None:
        """Somebody waits for the work."""
        self._hurried.set()

    def rest(self) -> None:
        """By the thread, after a piece of work."""
        worked = time.thread_time()
        if self._worked is not None:
            took = worked - self._worked
            if took < _PIECE:
                return
            waited = HERE.waited_for_processor()
            wanted = waited is None or waited - self._waited > _WANTED * took
            if wanted and threading.main_thread().is_alive():  # whose end waits for all threads
                self._hurried.wait(took * (1 / SHARE - 1))
        self._worked, self._waited = worked, HERE.waited_for_processor() or 0.0
