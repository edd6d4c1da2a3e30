"""What a rank computes in a step, observed from a run: when gradients come, and how long forward,
backward and update take without what they wait for their peers, and without the work around
collectives, which a plan of other buckets has more or less of.

What it guarantees: parameters have no hook of this after `close` (tensor pre-hooks, which leave no
trace), and nothing here communicates. What it does not do: on an accelerator the host's times say
nothing of the device's, so only hosts that compute themselves are observed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple, cast

from torch import Tensor

from zerort.step.readings import Components
from zerort.trace import TraceSink
from zerort.trace.breakdown import BreakdownSink, RangeTimes
from zerort.trace.sink import SinkAround
from zerort.tune.host import Host, measure_host

__all__ = ["Observer", "Profile", "slowest"]

_PARTS = ("forward", "backward", "step", "optimizer")
"""Ranges of a step; the last is a part of `step`."""


@dataclass(frozen=True)
class Profile:
    """Of one rank, in seconds of a step: medians over the steps that were observed."""

    wall: float
    """From one boundary to the next."""
    exposed: float
    """Of that, what the host stood still for its peers."""
    micro_batches: int
    forward: float
    """Of one micro-batch."""
    backward: float
    """Of one micro-batch."""
    reducing: float
    """Packing gradients, starting collectives, and adding up what has arrived, wherever in the
    step.
    """
    update: float
    """And starting to publish what has been updated. 0 where no update was observed."""
    publishing: float
    """What else is done for updated parameters."""
    other: float
    """All else: the user's own, and what the engine does between these."""
    arrivals: tuple[float, ...]
    """By parameter, what of the backward is computed until its gradient comes."""
    host: Host
    """How what is spent on a bucket grows with it."""
    steps: tuple[float, ...] = ()
    """Of each step, all but the waiting."""

    @property
    def computing(self) -> float:
        """All but the waiting."""
        return self.wall - self.exposed


@dataclass(frozen=True)
class _Step:
    wall: float
    parts: dict[str, tuple[float, float]]
    """Seconds computed in each range, and those that were waited."""
    reducing: float
    publishing: float
    arrivals: list[float]


class Observer:
    """Of one engine, from its making until `close`; `crossed` ends a step."""

    def __init__(self, parts: Components) -> None:
        self.steps: list[_Step] = []
        self._parts = parts
        self._worked = _Worked(parts)
        self._params = parts.boundary.flat.params
        self._micro_batches = parts.batch.accumulation
        self._came = [0.0] * len(self._params)
        self._crossed = time.perf_counter()
        self._begun = self._worked.alone()
        self._awaits_forward = False
        self._times = RangeTimes()
        self._times.clock = lambda: parts.reduction.waited
        self._sink = cast(SinkAround, parts.sink)
        self._before: TraceSink = self._sink.inner
        self._sink.inner = _Ears(self._before, self._times, self._heard)
        self._inside = dict.fromkeys(_PARTS, 0.0)
        self._handles = [
            parameter.register_hook(partial(_note, self._came, index, self._worked.alone))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(self._params)
            if parameter.requires_grad
        ]
        self._marks = self._read()

    @contextmanager
    def _heard(self, name: str, shown: AbstractContextManager[None]) -> Iterator[None]:
        """A backward begins by the engine's call, or behind a forward."""
        if name == "forward" and self._awaits_forward:
            self._awaits_forward = False
            self.start()
        worked = self._worked
        if name == "backward":
            self._begun = worked.alone()
        before = worked.seconds
        with shown:
            yield
        if name in self._inside:
            self._inside[name] += worked.seconds - before
        if name == "forward":
            self._begun = worked.alone()

    def start(self) -> None:
        """A step begins now; else where the last has ended."""
        self._marks, self._crossed = self._read(), time.perf_counter()

    def await_forward(self) -> None:
        """A step begins with the next forward: what lies before it is no part of one."""
        self._awaits_forward = True

    def crossed(self) -> None:
        """A step is over."""
        now, marks = time.perf_counter(), self._read()
        (computed, waited, worked), before = marks, self._marks
        parts = {
            name: (computed[name] - before.computed[name], waited[name] - before.waited[name])
            for name in _PARTS
        }
        reducing, publishing = (
            there - here for here, there in zip(before.worked, worked, strict=True)
        )
        arrivals = [max(0.0, came - self._begun) if came else 0.0 for came in self._came]
        wall = now - self._crossed
        self.steps.append(_Step(wall, parts, reducing, publishing, arrivals))
        self._marks, self._crossed = marks, now

    def forget(self) -> None:
        """What has been observed was not typical."""
        self.steps.clear()

    def close(self) -> None:
        """Leaves the engine as it was."""
        if self._sink.inner is not self._before:
            self._sink.inner = self._before
        for handle in self._handles:
            handle.remove()
        for parameter in self._params:
            if not parameter._backward_hooks:
                parameter._backward_hooks = None  # an empty dictionary is still crossed for
        self._handles = []

    def profile(self) -> Profile:
        """Of the steps so far, one at least."""

        def typical(of: Callable[[_Step], float]) -> float:
            return median(map(of, self.steps))

        def computed(name: str) -> float:
            return typical(lambda step: step.parts[name][0])

        count, boundary = self._micro_batches, self._parts.boundary
        every = zip(*(step.arrivals for step in self.steps), strict=True)
        arrivals = tuple(map(median, every))
        # a backward of the user's own is in no range: it lasts until the last gradient
        outside = computed("backward") == 0.0
        backward = max(computed("backward") / count, max(arrivals, default=0.0))
        wall, exposed = typical(lambda step: step.wall), typical(_waited)
        forward, update = computed("forward"), computed("optimizer")
        reducing = typical(lambda step: step.reducing)
        publishing = typical(lambda step: step.publishing)
        used = forward + backward * (count if not outside else 1) + reducing + update + publishing
        return Profile(
            wall=wall,
            exposed=exposed,
            micro_batches=count,
            forward=forward / count,
            backward=backward,
            reducing=reducing,
            update=update,
            publishing=publishing,
            other=max(0.0, wall - exposed - used),
            arrivals=arrivals,
            host=measure_host(self._parts.mesh, boundary.flat, boundary.optimizer),
            steps=tuple(step.wall - _waited(step) for step in self.steps),
        )

    def _read(self) -> _Marks:
        waited = {name: self._times.clocked(name) for name in _PARTS}
        computed = {
            name: self._times.seconds(name) - waited[name] - self._inside[name] for name in _PARTS
        }
        return _Marks(computed, waited, self._worked.both)


class _Marks(NamedTuple):
    """Seconds since the beginning."""

    computed: dict[str, float]
    """In each range, without what was waited and the work around collectives."""
    waited: dict[str, float]
    worked: tuple[float, float]
    """Reducing and publishing."""


class _Worked:
    """An engine's work around collectives, in seconds since the beginning."""

    def __init__(self, parts: Components) -> None:
        self._reduction = parts.reduction

    @property
    def both(self) -> tuple[float, float]:
        """Reducing and publishing."""
        return self._reduction.reducing, self._reduction.publishing

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.both)

    def alone(self) -> float:
        """A clock of the host that stands still while it works or waits for collectives."""
        return time.perf_counter() - self._reduction.waited - self.seconds


class _Ears(BreakdownSink):
    """Times ranges, and tells of them."""

    def __init__(
        self,
        inner: TraceSink,
        times: RangeTimes,
        heard: Callable[[str, AbstractContextManager[None]], AbstractContextManager[None]],
    ) -> None:
        super().__init__(inner, times, logs=False)
        self._heard = heard

    def range(self, name: str) -> AbstractContextManager[None]:
        """As it is, timed."""
        return self._heard(name, super().range(name))


def _waited(step: _Step) -> float:
    return sum(step.parts[name][1] for name in ("forward", "backward", "step"))


def _note(came: list[float], index: int, now: Callable[[], float], _: Tensor) -> None:
    came[index] = now()


def slowest(profiles: Sequence[Profile]) -> Profile:
    """Of all ranks', the one that the others wait for; where that is now one and now another, what
    a step takes longer by that is added to what it computes outside its passes.
    """
    slow = max(profiles, key=lambda profile: profile.computing)
    last = [max(ranks) for ranks in zip(*(profile.steps for profile in profiles), strict=False)]
    skew = max(0.0, median(last) - median(slow.steps)) if last else 0.0
    return replace(slow, other=slow.other + skew)
