"""`wall_clock_breakdown`: a line of log per step with the host's milliseconds in each range."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from zerort.trace.sink import TraceSink

__all__ = ["BreakdownSink"]

_log = logging.getLogger("zerort")


class BreakdownSink:
    """`inner`, whose ranges are added up and told at each step. The rest is `inner`'s own.

    On CUDA a range is what the host took to enqueue it; the device's times are in the trace.
    """

    def __init__(self, inner: TraceSink) -> None:
        self._inner = inner
        self._seconds: dict[str, float] = {}
        self.enabled = inner.enabled
        self.path = inner.path
        self.now = inner.now
        self.mark = inner.mark
        self.on_device = inner.on_device
        self.span = inner.span
        self.wait = inner.wait
        self.life = inner.life
        self.counter = inner.counter
        self.flush = inner.flush
        self.close = inner.close

    def range(self, name: str) -> AbstractContextManager[None]:
        """A range of `inner`, timed."""
        return self._timed(name, self._inner.range(name))

    def step(self, number: int) -> None:
        """Tells the times since the step before."""
        told = " | ".join(f"{name}: {1000 * seconds:.2f}" for name, seconds in self._seconds.items())
        _log.warning("step %d, time (ms) | %s", number, told)
        self._seconds.clear()
        self._inner.step(number)

    @contextmanager
    def _timed(self, name: str, shown: AbstractContextManager[None]) -> Iterator[None]:
        start = time.perf_counter()
        with shown:
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
