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

from collections.abc import Sequence
from typing import NamedTuple

from zerort.features.site import Site
from zerort.features.stopwatch import Stopwatches
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

    forward: float
    backward: float
    retire: float
    step: float
    waited: float
    """For collectives, in backwards and for their sums."""


class Timers(Feature):
    """Keeps the times of one engine, on every rank."""

    name = "wall_clock_breakdown"

    def __init__(self, times: RangeTimes) -> None:
        self.shown: dict[str, float] = {}
        """All ten, in ms, as of the last `step`."""
        self.stopwatches = Stopwatches(enabled=True)
        self._times = times
        self._before = self._marks()
        self._window = dict.fromkeys(TIMERS, 0.0)
        self._is_over = False

    @classmethod
    def open(cls, site: Site) -> Timers | None:
        """Where the configuration asks for it."""
        times, reduction = site.parts.times, site.parts.reduction
        if times is None:
            return None
        if reduction.executor.device.blocks:
            times.clock = lambda: reduction.waited
        return cls(times)

    def before_vote(self, *, failed: bool) -> None:
        """The window ends with this micro-batch."""
        self._is_over = True

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
        self._window = dict.fromkeys(TIMERS, 0.0) if self._is_over else window
        self._before, self._is_over = now, False

    def dropped(self) -> None:
        """Where ranks have parted at a boundary, it is over without an end."""
        if self._is_over:
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
        times = (forward, whole, whole - waited, waited, step - retire)
        return dict(zip(TIMERS, times, strict=True))

    def _marks(self) -> _Marks:
        read, clocked = self._times.seconds, self._times.clocked
        waited = clocked("backward") + clocked("retire")
        return _Marks(read("forward"), read("backward"), read("retire"), read("step"), waited)
