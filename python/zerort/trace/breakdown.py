"""Times of ranges on the host, summed by name; and `wall_clock_breakdown`'s line of log per step.

On an accelerator a range is what the host took to enqueue it; the device's times are in the trace.
Nothing here synchronises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from zerort.trace.sink import SinkAround, TraceSink

__all__ = ["BreakdownSink", "RangeTimes"]

_log = logging.getLogger("zerort")


class RangeTimes:
    """Seconds in each range since the beginning, the one that is under way included."""

    def __init__(self) -> None:
        self._ended: dict[str, float] = {}
        self._begun: dict[str, float] = {}

    def seconds(self, name: str) -> float:
        """In ranges of this name so far."""
        begun = self._begun.get(name)
        ended = self._ended.get(name, 0.0)
        return ended if begun is None else ended + time.perf_counter() - begun

    def ended(self) -> dict[str, float]:
        """By name, without those that are under way."""
        return {name: took for name, took in self._ended.items() if name not in self._begun}

    @contextmanager
    def timed(self, name: str, shown: AbstractContextManager[None]) -> Iterator[None]:
        """`shown`, timed."""
        start = self._begun[name] = time.perf_counter()
        try:
            with shown:
                yield
        finally:
            self._begun.pop(name, None)
            self._ended[name] = self._ended.get(name, 0.0) + time.perf_counter() - start


class BreakdownSink(SinkAround):
    """Adds the times of `inner`'s ranges up in `times`; if it `logs`, in a line at each step."""

    def __init__(self, inner: TraceSink, times: RangeTimes, *, logs: bool) -> None:
        super().__init__(inner)
        self._times = times
        self._logs = logs
        self._shown: dict[str, float] = {}

    def range(self, name: str) -> AbstractContextManager[None]:
        """A range of `inner`, timed."""
        return self._times.timed(name, super().range(name))

    def step(self, number: int) -> None:
        """Logs the times since the step before."""
        if self._logs:
            ended = self._times.ended()
            times = " | ".join(
                f"{name}: {1000 * (seconds - self._shown.get(name, 0.0)):.2f}"
                for name, seconds in ended.items()
            )
            _log.info("step %d, time (ms) | %s", number, times)
            self._shown = ended
        super().step(number)
