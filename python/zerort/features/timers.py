"""`wall_clock_breakdown`: the host's milliseconds in the parts of a micro-batch and of a window.

| timer           | what it is                                                             |
|-----------------|------------------------------------------------------------------------|
| `fwd`           | `engine(...)`                                                          |
| `bwd`           | `engine.backward(loss)`, and what the boundary still waits for its sums |
| `bwd_allreduce` | of that, the time the host stood still for collectives                 |
| `bwd_inner`     | the rest of it                                                         |
| `step`          | `engine.step()` without that wait: vote, optimizer, publish            |

With `_microstep` behind its name a timer is of the last micro-batch, without of its window so far.
What a backward of the user's own takes is in none of them. On an accelerator times are the host's,
which stands still for nothing; the device's are in the trace. Nothing here synchronises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from zerort.features.site import Site
from zerort.features.stopwatch import Stopwatches
from zerort.grads.reduction import Reduction
from zerort.step.events import Feature
from zerort.trace.breakdown import RangeTimes

__all__ = ["TIMERS", "Timers"]

TIMERS = ("fwd", "bwd", "bwd_inner", "bwd_allreduce", "step")

_SHOWN = {
    "fwd": "forward",
    "bwd": "backward",
    "bwd_inner": "backward_inner",
    "bwd_allreduce": "backward_allreduce",
    "step": "step",
}
"""What monitors call them."""


class _Marks(NamedTuple):
    """Seconds since the beginning."""

    forward: float = 0.0
    backward: float = 0.0
    retire: float = 0.0
    step: float = 0.0
    waited: float = 0.0
    """For collectives of backwards."""


class Timers(Feature):
    """Keeps the times of one engine, on every rank."""

    name = "wall_clock_breakdown"

    def __init__(self, times: RangeTimes, reduction: Reduction, *, blocks: bool) -> None:
        self.shown: dict[str, float] = {}
        """All ten, in ms, as of the last `step`."""
        self.stopwatches = Stopwatches(enabled=True)
        self._times = times
        self._reduction = reduction
        self._blocks = blocks
        self._elsewhere = 0.0
        """Seconds waited outside backwards."""
        self._voting: float | None = None
        """Seconds waited when the vote began."""
        self._before = self._marks()
        self._window = dict.fromkeys(TIMERS, 0.0)

    @classmethod
    def open(cls, site: Site) -> Timers | None:
        """Where the configuration asks for it."""
        times, parts = site.parts.times, site.parts
        if times is None:
            return None
        return cls(times, parts.reduction, blocks=parts.reduction.executor.device.blocks)

    def forward(self) -> AbstractContextManager[None]:
        """What a forward waits for is its own."""
        return self._waiting_elsewhere()

    @contextmanager
    def _waiting_elsewhere(self) -> Iterator[None]:
        before = self._waited
        try:
            yield
        finally:
            self._elsewhere += self._waited - before

    def before_vote(self, *, failed: bool) -> None:
        """Sums have come; what is waited for from here on is the step's."""
        self._voting = self._waited

    def readings(self) -> Sequence[tuple[str, float]]:
        """The window's, for monitors."""
        sums = self._added(self._micro(self._marks()))
        return [(f"Train/Samples/elapsed_time_ms_{_SHOWN[name]}", sums[name]) for name in TIMERS]

    def ended(self) -> None:
        """A micro-batch is over."""
        now = self._marks()
        micro = self._micro(now)
        window = self._added(micro)
        self.shown = {f"{name}_microstep": took for name, took in micro.items()} | window
        self.stopwatches.show(self.shown)
        is_boundary = self._voting is not None
        self._window = dict.fromkeys(TIMERS, 0.0) if is_boundary else window
        if self._voting is not None:
            self._elsewhere += self._waited - self._voting
            self._voting = None
        self._before = now

    def dropped(self) -> None:
        """Where ranks have parted at a boundary, it is over without an end."""
        if self._voting is not None:
            self.ended()

    def _added(self, micro: dict[str, float]) -> dict[str, float]:
        """The window with this micro-batch."""
        return {name: self._window[name] + took for name, took in micro.items()}

    def _micro(self, now: _Marks) -> dict[str, float]:
        """The micro-batch until `now`, in ms."""
        forward, backward, retire, step, waited = (
            1000 * (b - a) for a, b in zip(self._before, now, strict=True)
        )
        whole = backward + retire
        waited = min(waited, whole)
        times = (forward, whole, whole - waited, waited, step - retire)
        return dict(zip(TIMERS, times, strict=True))

    def _marks(self) -> _Marks:
        read = self._times.seconds
        waited = (self._waited if self._voting is None else self._voting) - self._elsewhere
        return _Marks(read("forward"), read("backward"), read("retire"), read("step"), waited)

    @property
    def _waited(self) -> float:
        return self._reduction.waited if self._blocks else 0.0
