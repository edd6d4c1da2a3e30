"""`wall_clock_breakdown`: a line of log per step with the host's milliseconds in each range."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from zerort.trace.sink import SinkAround, TraceSink

__all__ = ["BreakdownSink"]

_log = logging.getLogger("zerort")


class BreakdownSink(SinkAround):
    """Adds the times of `inner`'s ranges up and logs them at each step.

    On an accelerator a range is what the host took to enqueue it; the device's times are in the
    trace.
    """

    def __init__(self, inner: TraceSink) -> None:
        super().__init__(inner)
        self._seconds: dict[str, float] = {}

    def range(self, name: str) -> AbstractContextManager[None]:
        """A range of `inner`, timed."""
        return self._timed(name, super().range(name))

    def step(self, number: int) -> None:
        """Logs the times since the step before."""
        times = " | ".join(
            f"{name}: {1000 * seconds:.2f}" for name, seconds in self._seconds.items()
        )
        _log.info("step %d, time (ms) | %s", number, times)
        self._seconds.clear()
        super().step(number)

    @contextmanager
    def _timed(self, name: str, shown: AbstractContextManager[None]) -> Iterator[None]:
        start = time.perf_counter()
        with shown:
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
