"""Where runtime events go: the protocol of a sink, the moments it understands, and the sink that
costs nothing.

The engine and the executor describe what happens in the words below and never learn who listens. A
moment (`Mark`) is a host time in nanoseconds of `time.perf_counter_ns`, or an event recorded on a
device's stream whose time is asked for later; a caller passes on what `mark()` gave and does not
need to know which of the two it holds.

A sink never changes what it observes: it blocks no stream, touches no tensor and raises nothing
after it was opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

__all__ = [
    "BUCKETS",
    "EXPOSED",
    "MAIN",
    "PHASES",
    "STEP",
    "WAIT",
    "Arg",
    "BucketLife",
    "DeviceEvent",
    "Mark",
    "NullSink",
    "SinkAround",
    "TraceSink",
]

MAIN = "main"
"""The track of forward, backward, wait, optimizer and publish: what the training loop itself is
doing.
"""
BUCKETS = "buckets"
"""The track of the buckets' lives."""
PHASES = ("filling", "queued", "in flight", "summing")
"""Of a bucket's life, between its moments."""
WAIT = "wait"
"""The span of a `TraceSink.wait`."""
STEP = "step"
"""The instant that ends a step."""
EXPOSED = "exposed communication"
"""The counter of milliseconds waited since the step began."""

Arg: TypeAlias = str | int | float


class DeviceEvent(Protocol):
    """What a sink needs of a recorded `torch.Event(enable_timing=True)`."""

    def query(self) -> bool:
        """True when the stream has passed the event."""
        ...

    def synchronize(self) -> None:
        """Blocks the host until then."""
        ...

    def elapsed_time(self, end: DeviceEvent, /) -> float:
        """Milliseconds from this event to `end`; both have passed."""
        ...


Mark: TypeAlias = int | DeviceEvent
"""A moment: `time.perf_counter_ns()`, or an event on a device's stream."""


class BucketLife(NamedTuple):
    """The five moments of one bucket in one pass, in the order in which they happen."""

    first: Mark
    """Its first gradient came."""
    full: Mark
    """Its last gradient came."""
    launched: Mark
    """Its collective started."""
    landed: Mark
    """The last of its collectives was waited for: its result could be taken."""
    retired: Mark
    """Its result was taken and its buffer was free again."""


class TraceSink(Protocol):
    """A listener to the runtime. Only `range` and `step` are called without asking `enabled`."""

    @property
    def enabled(self) -> bool:
        """Whether times are wanted. False: a caller need not take any."""
        ...

    @property
    def path(self) -> Path | None:
        """The file this sink writes, if it writes one."""
        ...

    def now(self) -> int:
        """The host's time, for counters and for `Reducer.grad_ready_at`."""
        ...

    def mark(self) -> Mark:
        """This moment: on the current stream once `on_device` was called, on the host before."""
        ...

    def on_device(self, record: Callable[[], DeviceEvent]) -> None:
        """From now on a moment is an event: `record` makes one with timing and records it on the
        current stream.
        """
        ...

    def about(self, facts: Mapping[str, Arg]) -> None:
        """What is true of the whole run, such as its stage: kept however many events there are."""
        ...

    def range(self, name: str) -> AbstractContextManager[None]:
        """A span of the main track: `forward`, `backward`, `optimizer`, `publish`."""
        ...

    def span(self, track: str, name: str, start: Mark, end: Mark, **args: Arg) -> None:
        """Something that has ended on a track: one for each stream or worker. Spans of one track
        nest.
        """
        ...

    def wait(self, start: Mark, end: Mark, **args: Arg) -> None:
        """The main track stood still for a collective. The sum over a step is its exposed
        communication.
        """
        ...

    def life(self, bucket: int, moments: BucketLife, **args: Arg) -> None:
        """A bucket has been retired; one call for each bucket and pass.

        `args` as far as they are known: `bytes`, `dtype`, `params` (how many), `last` (name of the
        parameter that came last), `alone_ms` (how long it lacked that one alone).
        """
        ...

    def counter(self, name: str, at: int, value: float) -> None:
        """A quantity took a new value at `at` (ns, `now()`), such as `bytes in flight`."""
        ...

    def step(self, number: int) -> None:
        """Optimizer step `number` is complete: everything since the one before belongs to it."""
        ...

    def flush(self) -> None:
        """Brings what was collected to where it is kept. Waits for device events that have not
        passed.
        """
        ...

    def close(self) -> None:
        """The last `flush`; what comes afterwards is dropped. Closing twice does nothing."""
        ...


class NullSink:
    """The sink of a run without a trace: `enabled` is False and nothing is kept, allocated or
    timed.
    """

    enabled = False
    path = None
    now = staticmethod(time.perf_counter_ns)
    mark = staticmethod(time.perf_counter_ns)

    def on_device(self, record: Callable[[], DeviceEvent]) -> None:
        """Ignored: no event is ever recorded."""

    def about(self, facts: Mapping[str, Arg]) -> None:
        """Ignored."""

    def range(self, name: str) -> AbstractContextManager[None]:
        """One shared context that does nothing."""
        return _NOTHING

    def span(self, track: str, name: str, start: Mark, end: Mark, **args: Arg) -> None:
        """Ignored."""

    def wait(self, start: Mark, end: Mark, **args: Arg) -> None:
        """Ignored."""

    def life(self, bucket: int, moments: BucketLife, **args: Arg) -> None:
        """Ignored."""

    def counter(self, name: str, at: int, value: float) -> None:
        """Ignored."""

    def step(self, number: int) -> None:
        """Ignored."""

    def flush(self) -> None:
        """Ignored."""

    def close(self) -> None:
        """Ignored."""


class SinkAround:
    """`inner`, for a subclass that adds to some of its calls; the rest is `inner`'s own, at no
    cost.
    """

    def __init__(self, inner: TraceSink) -> None:
        self.inner = inner
        self.enabled = inner.enabled
        self.path = inner.path
        self.now = inner.now
        self.mark = inner.mark
        self.on_device = inner.on_device
        self.about = inner.about
        self.span = inner.span
        self.wait = inner.wait
        self.life = inner.life
        self.counter = inner.counter
        self.flush = inner.flush
        self.close = inner.close

    def range(self, name: str) -> AbstractContextManager[None]:
        """`inner`'s range."""
        return self.inner.range(name)

    def step(self, number: int) -> None:
        """`inner`'s step."""
        self.inner.step(number)


_NOTHING = nullcontext()
