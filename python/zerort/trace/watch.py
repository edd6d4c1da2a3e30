"""What the executor reports of buckets, and how it becomes events of a sink.

A `Watch` is called a few times per bucket, never per parameter. It never changes what it observes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from zerort import _core
from zerort.trace.sink import Arg, BucketLife, Mark, TraceSink

__all__ = ["BucketWatch", "Collective", "Unwatched", "Watch", "Watches"]


class Collective(Protocol):
    """What knows when it is complete."""

    def when_complete(self, call: Callable[[], None]) -> None:
        """Calls `call` once, on whichever thread finds out."""


class Watch(Protocol):
    """A listener to the executor."""

    enabled: bool
    """Whether anybody listens."""
    times_gradients: bool
    """Whether the times at which gradients come are wanted, so that each has a hook."""

    def mark(self) -> Mark:
        """This moment."""

    def launched(self, bucket: _core.Bucket, size: int, dtype: torch.dtype) -> None:
        """The bucket's gradients are on their way: `size` bytes of elements of `dtype`."""

    def started(self, name: str, size: int, work: Collective) -> None:
        """A collective over `size` bytes has started; `work` may say when it is complete."""

    def landed(self, name: str) -> None:
        """The wait for the collective of that name is over; on the stream that takes its result."""

    def waited(self, start: Mark, what: str) -> None:
        """Since `start` the caller stood still for the collective `what`."""

    def retired(self, bucket: _core.Bucket) -> None:
        """The bucket's sum was taken."""

    def gathered(self, unit: _core.Unit, size: int) -> None:
        """The unit's `size` bytes of values have memory from now on."""

    def freed(self, unit: int) -> None:
        """That memory was given back, if there was any."""

    def passed(self, lives: Sequence[tuple[int, int, int, int, int]]) -> None:
        """A pass is over; `lives` is the core's `Reducer.life()`."""


class Unwatched:
    """Without a trace: nothing is recorded."""

    enabled = False
    times_gradients = False

    def mark(self) -> Mark:
        """No clock is read."""
        return 0

    def launched(self, bucket: _core.Bucket, size: int, dtype: torch.dtype) -> None:
        """Ignored."""

    def started(self, name: str, size: int, work: Collective) -> None:
        """Ignored."""

    def landed(self, name: str) -> None:
        """Ignored."""

    def waited(self, start: Mark, what: str) -> None:
        """Ignored."""

    def retired(self, bucket: _core.Bucket) -> None:
        """Ignored."""

    def gathered(self, unit: _core.Unit, size: int) -> None:
        """Ignored."""

    def freed(self, unit: int) -> None:
        """Ignored."""

    def passed(self, lives: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Ignored."""


_NAMES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.uint8: "u8",
}


class _Launch(NamedTuple):
    """When a bucket left, and what of it is sent: bytes, element type."""

    at: Mark
    size: int
    dtype: str


class BucketWatch:
    """Reports to a sink each bucket's life, each collective's span and each wait."""

    enabled = True
    times_gradients = True

    def __init__(self, sink: TraceSink, names: Sequence[str]) -> None:
        self._sink = sink
        self._names = names
        self._launched: dict[int, _Launch] = {}
        self._landed: dict[int, Mark] = {}
        self._retired: dict[int, tuple[_core.Bucket, Mark]] = {}
        self._units: dict[int, tuple[Mark, int, str]] = {}
        self._lanes: list[bool] = []
        self._bytes = 0
        self._counting = threading.Lock()

    def mark(self) -> Mark:
        """The sink's clock, or an event on the current stream."""
        return self._sink.mark()

    def launched(self, bucket: _core.Bucket, size: int, dtype: torch.dtype) -> None:
        """Keeps moment and load for the bucket's life."""
        name = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        self._launched[bucket.id] = _Launch(self._sink.mark(), size, name)

    def started(self, name: str, size: int, work: Collective) -> None:
        """A span on the first lane that is free, so that spans of one track never cross."""
        start = self._sink.mark()
        if not isinstance(start, int):
            return  # on a device the collective's own stream would have to be asked
        lane = self._lanes.index(False) if False in self._lanes else len(self._lanes)
        self._lanes[lane : lane + 1] = [True]
        self._count(size)

        def complete() -> None:
            # Runs on the worker that completed it: the only place where the time of completion is
            # known.
            self._sink.span(f"collectives {lane}", name, start, self._sink.now(), bytes=size)
            self._lanes[lane] = False
            self._count(-size)

        work.when_complete(complete)

    def landed(self, name: str) -> None:
        """Keeps the moment for the life of a bucket that was launched: of several hops the last."""
        bucket = int(name.rpartition(" b")[2])
        if bucket in self._launched:
            self._landed[bucket] = self._sink.mark()

    def waited(self, start: Mark, what: str) -> None:
        """Exposed communication."""
        self._sink.wait(start, self._sink.mark(), what=what)

    def retired(self, bucket: _core.Bucket) -> None:
        """Ends the bucket's life."""
        self._retired[bucket.id] = (bucket, self._sink.mark())

    def gathered(self, unit: _core.Unit, size: int) -> None:
        """Keeps since when the unit is whole or on its way."""
        if unit.id not in self._units:
            buckets = " ".join(f"b{bucket}" for bucket in unit.buckets)
            self._units[unit.id] = (self._sink.mark(), size, buckets)

    def freed(self, unit: int) -> None:
        """A span of the unit's track: how long it had memory."""
        if unit in self._units:
            start, size, buckets = self._units.pop(unit)
            track, now = f"unit {unit}", self._sink.mark()
            self._sink.span(track, "whole", start, now, bytes=size, buckets=buckets)

    def passed(self, lives: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Reports the lives of the pass, now that all four moments are known."""
        arrivals = {bucket: rest for bucket, *rest in lives}
        for index, (bucket, retired) in self._retired.items():
            if index not in self._launched:
                continue  # its launch was broken off before anybody could report it
            launch = self._launched[index]
            landed = self._landed.get(index, retired)  # a pass that is lost waits for nothing
            first: Mark = launch.at
            full: Mark = launch.at
            named: dict[str, Arg] = {}
            if index in arrivals:
                first, prior, full, last = arrivals[index]
                named = {"last": self._names[last], "alone_ms": (full - prior) / 1e6}
            moments = BucketLife(first, full, launch.at, landed, retired)
            self._sink.life(
                index,
                moments,
                bytes=launch.size,
                dtype=launch.dtype,
                params=len(bucket.params),
                **named,
            )
        self._launched.clear()
        self._retired.clear()
        self._landed.clear()

    def _count(self, difference: int) -> None:
        # Collectives complete on several threads; the sums must reach the sink in the order in
        # which they were true.
        with self._counting:
            self._bytes += difference
            self._sink.counter("bytes in flight", self._sink.now(), self._bytes)


class Watches:
    """Several that listen; moments are the first one's."""

    enabled = True

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches
        self.times_gradients = any(watch.times_gradients for watch in watches)

    def mark(self) -> Mark:
        """The first one's."""
        return self._watches[0].mark()

    def launched(self, bucket: _core.Bucket, size: int, dtype: torch.dtype) -> None:
        """To each."""
        for watch in self._watches:
            watch.launched(bucket, size, dtype)

    def started(self, name: str, size: int, work: Collective) -> None:
        """To each."""
        for watch in self._watches:
            watch.started(name, size, work)

    def landed(self, name: str) -> None:
        """To each."""
        for watch in self._watches:
            watch.landed(name)

    def waited(self, start: Mark, what: str) -> None:
        """To each."""
        for watch in self._watches:
            watch.waited(start, what)

    def retired(self, bucket: _core.Bucket) -> None:
        """To each."""
        for watch in self._watches:
            watch.retired(bucket)

    def gathered(self, unit: _core.Unit, size: int) -> None:
        """To each."""
        for watch in self._watches:
            watch.gathered(unit, size)

    def freed(self, unit: int) -> None:
        """To each."""
        for watch in self._watches:
            watch.freed(unit)

    def passed(self, lives: Sequence[tuple[int, int, int, int, int]]) -> None:
        """To each."""
        for watch in self._watches:
            watch.passed(lives)
