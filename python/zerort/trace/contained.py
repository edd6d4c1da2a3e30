"""The one place where what an observer raises ends.

A trace, a monitor, a watch look on: on one rank, usually. If one of them raised through a hook or
through `step`, that rank would leave its peers in the middle of a pass. So the engine reaches them
through the classes here: an `Exception` is said once, as a warning, and the observed goes on. What
is no `Exception`, Ctrl-C above all, is not the observer's and goes through.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

import torch

from zerort import _core
from zerort.trace.sink import Arg, BucketLife, DeviceEvent, Mark, SinkAround, TraceSink
from zerort.trace.watch import Collective, Watch

__all__ = ["ContainedSink", "ContainedWatch"]

_log = logging.getLogger("zerort")

T = TypeVar("T")


class _Guard:
    """Calls an observer."""

    def __init__(self, observer: object) -> None:
        self._name = type(observer).__name__
        self._said = False

    def call(self, run: Callable[..., T], *args: Any, otherwise: T, **named: Any) -> T:
        """What `run` returns, `otherwise` where it raises."""
        try:
            return run(*args, **named)
        except Exception as error:
            self.say(error)
            return otherwise

    def say(self, error: Exception) -> None:
        """Once."""
        if not self._said:
            self._said = True
            _log.warning(
                "%s raised %s: %s. It only observes, so training goes on; what it has missed is "
                "lost, and further errors of it are not said",
                self._name,
                type(error).__name__,
                error,
                exc_info=error,
            )


class ContainedSink(SinkAround):
    """`inner`, of which nothing raises."""

    def __init__(self, inner: TraceSink) -> None:
        super().__init__(inner)
        self._guard = _Guard(inner)
        if inner.enabled:
            self._contain(inner)

    def _contain(self, inner: TraceSink) -> None:
        call = self._guard.call

        def mark() -> Mark:
            now: Mark = time.perf_counter_ns()
            return call(inner.mark, otherwise=now)

        def on_device(record: Callable[[], DeviceEvent]) -> None:
            call(inner.on_device, record, otherwise=None)

        def about(facts: Mapping[str, Arg]) -> None:
            call(inner.about, facts, otherwise=None)

        def span(track: str, name: str, start: Mark, end: Mark, **args: Arg) -> None:
            call(inner.span, track, name, start, end, otherwise=None, **args)

        def wait(start: Mark, end: Mark, **args: Arg) -> None:
            call(inner.wait, start, end, otherwise=None, **args)

        def life(bucket: int, moments: BucketLife, **args: Arg) -> None:
            call(inner.life, bucket, moments, otherwise=None, **args)

        def counter(name: str, at: int, value: float) -> None:
            call(inner.counter, name, at, value, otherwise=None)

        self.mark, self.on_device, self.about = mark, on_device, about
        self.span, self.wait, self.life, self.counter = span, wait, life, counter
        self.flush = lambda: call(inner.flush, otherwise=None)
        self.close = lambda: call(inner.close, otherwise=None)

    def range(self, name: str) -> AbstractContextManager[None]:
        """`inner`'s range, entered and left without an error of its own."""
        return _ContainedRange(self._guard, self.inner, name)

    def step(self, number: int) -> None:
        """`inner`'s step."""
        self._guard.call(self.inner.step, number, otherwise=None)


class _ContainedRange:
    __slots__ = ("_guard", "_inner", "_name", "_range")

    def __init__(self, guard: _Guard, inner: TraceSink, name: str) -> None:
        self._guard = guard
        self._inner = inner
        self._name = name
        self._range: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        try:
            entered = self._inner.range(self._name)
            entered.__enter__()
            self._range = entered
        except Exception as error:
            self._guard.say(error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._range is None:
            return
        try:
            self._range.__exit__(kind, error, at)
        except Exception as raised:
            if raised is not error:
                self._guard.say(raised)


class ContainedWatch:
    """`inner`, of which nothing raises."""

    def __init__(self, inner: Watch) -> None:
        self.enabled = inner.enabled
        self.times_gradients = inner.times_gradients
        self._inner = inner
        self._call = _Guard(inner).call

    def mark(self) -> Mark:
        """`inner`'s moment, the host's where it has none."""
        now: Mark = time.perf_counter_ns()
        return self._call(self._inner.mark, otherwise=now)

    def launched(self, bucket: _core.Bucket, size: int, dtype: torch.dtype) -> None:
        """As `inner`'s."""
        self._call(self._inner.launched, bucket, size, dtype, otherwise=None)

    def started(self, name: str, size: int, work: Collective) -> None:
        """As `inner`'s."""
        self._call(self._inner.started, name, size, work, otherwise=None)

    def landed(self, name: str) -> None:
        """As `inner`'s."""
        self._call(self._inner.landed, name, otherwise=None)

    def waited(self, start: Mark, what: str) -> None:
        """As `inner`'s."""
        self._call(self._inner.waited, start, what, otherwise=None)

    def retired(self, bucket: _core.Bucket) -> None:
        """As `inner`'s."""
        self._call(self._inner.retired, bucket, otherwise=None)

    def gathered(self, unit: _core.Unit, size: int) -> None:
        """As `inner`'s."""
        self._call(self._inner.gathered, unit, size, otherwise=None)

    def freed(self, unit: int) -> None:
        """As `inner`'s."""
        self._call(self._inner.freed, unit, otherwise=None)

    def passed(self, lives: Sequence[tuple[int, int, int, int, int]]) -> None:
        """As `inner`'s."""
        self._call(self._inner.passed, lives, otherwise=None)
