"""Times of ranges on the host, summed by name; and `wall_clock_breakdown`'s line of log per step.

On an accelerator a range is what the host took to enqueue it; the device's times are in the trace.
Nothing here synchronises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from zerort.trace.sink import SinkAround, TraceSink

__all__ = ["BreakdownSink", "RangeTimes"]

_log = logging.getLogger("zerort")


class _Sums(NamedTuple):
    seconds: float = 0.0
    clocked: float = 0.0


class RangeTimes:
    """Seconds in each range since the beginning, the one that is under way included; and how much
    of them `clock`, a sum of seconds that something took, went on by.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = _stands
        self._ended: dict[str, _Sums] = {}
        self._begun: dict[str, _Sums] = {}

    def seconds(self, name: str) -> float:
        """In ranges of this name so far."""
        return self._sums(name).seconds

    def clocked(self, name: str) -> float:
        """By how much `clock` went on in them."""
        return self._sums(name).clocked

    def _sums(self, name: str) -> _Sums:
        ended, begun = self._ended.get(name, _Sums()), self._begun.get(name)
        if begun is None:
            return ended
        now = self._now()
        return _Sums(
            ended.seconds + now.seconds - begun.seconds, ended.clocked + now.clocked - begun.clocked
        )

    def ended(self) -> dict[str, float]:
        """Seconds by name, without the ranges that are under way."""
        return {name: sums.seconds for name, sums in self._ended.items() if name not in self._begun}

    def _now(self) -> _Sums:
        return _Sums(time.perf_counter(), self.clock())

    @contextmanager
    def timed(self, name: str, shown: AbstractContextManager[None]) -> Iterator[None]:
        """`shown`, timed."""
        self._begun[name] = self._now()
        try:
            with shown:
                yield
        finally:
            self._ended[name] = self._sums(name)
            self._begun.pop(name, None)


def _stands() -> float:
    return 0.0


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
