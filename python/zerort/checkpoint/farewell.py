"""The end of a program beside which a save is still being written.

An interpreter waits for its threads before it does anything else at its end. So a rank that ends
without `engine.destroy()`, by an exception for example, would keep its connections until its save
is complete, and peers would wait for it in a collective as long, without a reason.

What it guarantees: as soon as the main thread has ended, `part` is called, once, while the save
goes on. What it does not do: it hurries nothing, and where the save is over it does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Farewell"]

_POLL = 0.1  # seconds


class Farewell(threading.Thread):
    """Beside one save, which is over when `ended` is set."""

    def __init__(self, ended: threading.Event, part: Callable[[], None]) -> None:
        super().__init__(name="zerort-farewell")
        self._ended, self._part = ended, part

    def run(self) -> None:
        """Until the save is over, or the main thread."""
        while not self._ended.wait(_POLL):
            if not threading.main_thread().is_alive():
                self._part()
                return
