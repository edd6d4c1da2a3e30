"""The sink that keeps events in the core's ring and writes them as a file for Perfetto or
`chrome://tracing`.

Each rank writes a file of its own, in which it is one process; opened together, the files show the
job. A file is in place and complete from the moment the sink is opened: empty at first, then as of
the last `flush`, or of the last boundary at which it was written beside the run (`trace.saver`),
which is what a killed process leaves. The last flush runs at `close` or, when an exception ends the
program, at interpreter exit.

Moments on a device are resolved once the device has passed them, at the end of a step or in
`flush`, never earlier, so tracing adds no synchronisation to a step. Where a bucket's life mixes
host and device moments (gradients arrive while the host runs ahead of the device), a phase that
would end before it starts has no length.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from zerort import _core
from zerort.errors import ConfigError
from zerort.trace.clock import DeviceClock, axis_offset
from zerort.trace.saver import Saver
from zerort.trace.sink import (
    BUCKETS,
    EXPOSED,
    MAIN,
    PHASES,
    STEP,
    WAIT,
    Arg,
    BucketLife,
    DeviceEvent,
    Mark,
)

__all__ = ["ChromeSink"]

Event: TypeAlias = tuple[tuple[Mark, ...], Callable[..., None]]
"""Moments, and what writes them once their times are known."""


class ChromeSink:
    """A trace file for one rank. Keeps the last `capacity` events; raises `ConfigError` if `path`
    cannot be written.
    """

    enabled = True
    now = staticmethod(time.perf_counter_ns)

    def __init__(self, path: Path, rank: int, capacity: int) -> None:
        self.path = path
        self._ring = _core.Trace(rank, capacity)
        self._tracks: dict[str, int] = {}
        self._offset = axis_offset()
        self._record: Callable[[], Mark] = time.perf_counter_ns
        self._clock: DeviceClock | None = None
        self._pending: deque[Event] = deque()
        self._taking = threading.RLock()
        self._exposed_ns = 0
        self._lives = 0
        self._owner: int | None = os.getpid()
        self._saver = Saver(str(path), self._saved)
        self._track(MAIN)
        self._track(BUCKETS)
        _claim(path, self._ring)
        atexit.register(self.close)

    def mark(self) -> Mark:
        """The host's time, or an event just recorded on the current stream."""
        return self._record()

    def on_device(self, record: Callable[[], DeviceEvent]) -> None:
        """Moments are events from now on. Waits for the device once, to learn how its time relates
        to the host's.
        """
        self._clock = DeviceClock(record)
        self._record = record

    def about(self, facts: Mapping[str, Arg]) -> None:
        """Facts for the head of the file."""
        for name, value in facts.items():
            self._ring.state(name, value)

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """A span of the main track around a block, also when an exception leaves it."""
        start = self.mark()
        try:
            yield
        finally:
            self.span(MAIN, name, start, self.mark())

    def span(self, track: str, name: str, start: Mark, end: Mark, **args: Arg) -> None:
        """A span on `track`, which is named by its first use."""
        row = self._track(track)
        self._resolved(
            (start, end), lambda start, end: self._ring.span(row, name, start, end, args)
        )

    def wait(self, start: Mark, end: Mark, **args: Arg) -> None:
        """A span on the main track, and a value of the counter of ms waited in this step."""

        def write(start: int, end: int) -> None:
            self._ring.span(self._tracks[MAIN], WAIT, start, end, args)
            self._exposed_ns += max(end - start, 0)
            self._ring.counter(EXPOSED, end, self._exposed_ns / 1e6)

        self._resolved((start, end), write)

    def life(self, bucket: int, moments: BucketLife, **args: Arg) -> None:
        """An async span from first gradient to retirement, and one inside it for each phase that
        took time.
        """
        key = self._lives
        self._lives += 1

        def write(*moments: int) -> None:
            row = self._tracks[BUCKETS]
            times = list(accumulate(moments, max))
            about = {"bucket": bucket, **args}
            self._ring.async_span(row, f"bucket {bucket}", key, times[0], times[-1], about)
            for phase, start, end in zip(PHASES, times, times[1:], strict=False):
                if end > start:
                    self._ring.async_span(row, phase, key, start, end)

        self._resolved(moments, write)

    def counter(self, name: str, at: int, value: float) -> None:
        """A value from `at` on."""
        self._resolved((at,), lambda at: self._ring.counter(name, at, value))

    def step(self, number: int) -> None:
        """Marks the boundary and takes the times of what the device has passed by now."""

        def write(at: int) -> None:
            self._ring.instant(self._tracks[MAIN], STEP, at, {"step": number})
            self._exposed_ns = 0
            self._ring.counter(EXPOSED, at, 0.0)

        self._resolved((self._record(),), write)
        self._settle(wait=False)
        if os.getpid() == self._owner:
            self._saver.look(self._ring.snapshot)

    def _saved(self, begun: int, ended: int) -> None:
        self.span("trace", "written", begun, ended)

    def flush(self) -> None:
        """Writes the file anew, with everything up to now. What goes wrong is warned of: a trace
        never ends a run.
        """
        if (
            os.getpid() != self._owner
        ):  # closed, or a forked child that would write its parent's file
            return
        self._saver.join()  # or what is older would take this one's place
        try:
            self._settle(wait=True)
        except RuntimeError as error:
            self._pending.clear()
            warnings.warn(
                f"trace {self.path}: the device's times are lost: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        try:
            self._ring.write(str(self.path))
        except OSError as error:
            warnings.warn(f"trace {self.path}: not written: {error}", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """The last `flush`."""
        self.flush()
        self._owner = None
        atexit.unregister(self.close)

    def _track(self, name: str) -> int:
        if name not in self._tracks:
            self._tracks[name] = self._ring.track(name)
        return self._tracks[name]

    def _resolved(self, moments: tuple[Mark, ...], write: Callable[..., None]) -> None:
        """Calls `write` with the moments in nanoseconds of the axis: now, or in turn once they are
        known.
        """
        self._pending.append((moments, write))
        if self._clock is None:
            self._settle(wait=False)

    def _settle(self, wait: bool) -> None:
        """Takes the queue as far as times are known. Collectives complete on threads of their own,
        so several come here at once: one takes, the others leave theirs to it and never block.
        """
        if not self._taking.acquire(blocking=wait):
            return
        try:
            # Out first: a signal's handler may come here in between, on this very thread.
            while (event := self._next()) is not None:
                moments, write = event
                if not self._is_known(moments, wait):
                    self._pending.appendleft(event)
                    return
                write(*map(self._axis, moments))
        finally:
            self._taking.release()

    def _next(self) -> Event | None:
        try:
            return self._pending.popleft()
        except IndexError:
            return None

    def _is_known(self, moments: tuple[Mark, ...], wait: bool) -> bool:
        for moment in moments:
            if isinstance(moment, int):
                continue
            if wait:
                moment.synchronize()
            elif not moment.query():
                return False
        return True

    def _axis(self, moment: Mark) -> int:
        if isinstance(moment, int):
            return moment + self._offset
        if self._clock is None:
            raise RuntimeError("a device event was given before `on_device`")
        return self._clock.ns(moment) + self._offset


def _claim(path: Path, ring: _core.Trace) -> None:
    """Writes the still empty trace, by the way that it will be written later: what fails then fails
    now.
    """
    try:
        # The rename at the end of a write would replace a device such as /dev/null.
        if path.exists() and not path.is_file():
            raise OSError("it exists and is not a regular file")
        ring.write(str(path))
    except OSError as error:
        raise ConfigError(
            f"zerort.trace.path: expected a file that can be written, got '{path}': {error}. "
            "Create its folder, or name another path (ZERORT_TRACE overrides the configuration)."
        ) from error
