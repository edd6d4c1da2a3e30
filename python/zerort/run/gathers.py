"""A unit under way: the parameters that are gathered and freed together, and their all-gathers;
and what is done with it.

What it guarantees: a gather is started once, whatever raises between two of its lines, and memory
is not given back while a collective writes to it. What it does not do: it does not know when its
turn is, nor who needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch

from zerort import _core
from zerort.errors import CommError
from zerort.memory import HeldBucket, unintercepted, version_of
from zerort.run.changes import Changes
from zerort.run.flight import FIRST, OVER, Flight
from zerort.run.secondary import Ways
from zerort.run.waits import Waits, called

__all__ = ["Following", "Gathers", "UnitFlight"]


class Following:
    """All-gathers between hosts that are followed by one inside: these start in the order of those,
    on all ranks, whenever each rank comes to it.

    A rank that waits for anything else has started all of them before (`reach`), so that no peer
    waits for one that never comes.
    """

    def __init__(self, waits: Waits, *, blocks: bool) -> None:
        self._waits = waits
        self._blocks = blocks
        self._waiting: deque[Flight] = deque()

    def add(self, flights: Iterable[Flight]) -> None:
        """First hops are about to start, in this order."""
        self._waiting.extend(flight for flight in flights if len(flight.hops) > 1)

    def advance(self) -> None:
        """Starts what goes without blocking."""
        while self._waiting:
            work = self._waiting[0].state.work
            if work is None or not work.is_completed():
                return
            self._start_next()

    def enqueue(self) -> None:
        """Starts all where waiting does not block the host."""
        if not self._blocks:
            self.reach()

    def reach(self, flight: Flight | None = None) -> None:
        """Starts those up to that of `flight`, all where None; waits for what comes before them."""
        while self._waiting and (flight is None or flight in self._waiting):
            self._start_next()

    def _start_next(self) -> None:
        flight = self._waiting[0]
        if flight.state.hop == 0:
            flight.start().wait()
            flight.take()
        if flight.state is not OVER:
            fresh = flight.state.work is None
            flight.start()
            if fresh:
                self._waits.started(flight)
        self._waiting.popleft()


class UnitFlight:
    """One unit's values on this rank. `pinned` counts who keeps them whole beside the passes."""

    __slots__ = (
        "_following",
        "_serial",
        "_versions",
        "_ways",
        "buckets",
        "contents",
        "flights",
        "pinned",
        "unit",
    )

    def __init__(
        self,
        unit: _core.Unit,
        buckets: Sequence[HeldBucket],
        ways: Ways,
        following: Following,
    ) -> None:
        self.unit = unit
        self.buckets = buckets
        first, last = buckets[0].names[0], buckets[-1].names[-1]
        self.contents = f"unit {unit.id} ({first if first == last else f'{first} .. {last}'})"
        self.pinned = 0
        self._ways = ways
        self._following = following
        self.flights: list[Flight] = []
        self._serial = -1
        self._versions: list[list[int]] = []

    @property
    def under_way(self) -> bool:
        """Whether an all-gather is not complete."""
        works = (flight.state.work for flight in self.flights)
        return any(work is not None and not work.is_completed() for work in works)

    @property
    def nbytes(self) -> int:
        """Of its values, whole."""
        return sum(b.spec.numel * b.owned.tensor.itemsize for b in self.buckets)

    @unintercepted
    def gather(self, serial: int) -> Sequence[Flight]:
        """Starts the all-gathers, in place; a second call with the same `serial` goes on with what
        the first has left undone. Raises `RuntimeError` where there is no memory.
        """
        if self._serial != serial:
            self.land()
            pairs = zip(self.buckets, self._ways.choose(), strict=True)
            self.flights = [Flight(bucket, hops) for bucket, hops in pairs]
            self._following.add(self.flights)
            self._serial = serial
        for flight in self.flights:
            if flight.state == FIRST:
                flight.bucket.bring()
            if flight.state is not OVER:
                flight.start()
        self._following.enqueue()
        return self.flights

    def land(self) -> None:
        """Waits for what is under way. Raises `RuntimeError` when it failed."""
        for flight in self.flights:
            self._following.reach(flight)
            while flight.state is not OVER:
                flight.start().wait()
                flight.take()
        self.flights = []

    @unintercepted
    def free(self, changes: Changes) -> None:
        """Gives the memory back, unless it is pinned; `changes` hear of what has been written."""
        self.land()
        for bucket in self.buckets if not self.pinned else ():
            if bucket.values.is_whole:
                changes.look(bucket)
            bucket.free()

    def forget(self) -> None:
        """The next gather is from all ranks."""
        self._ways.forget()

    def close(self) -> None:
        """It is gathered no more."""
        self._ways.close()

    def part_with_aliases(self, changes: Changes) -> None:
        """Before `free`: who has a view of the values keeps that memory, and what was written into
        it is heard of now.
        """
        for bucket in self.buckets:
            if bucket.is_aliased:
                changes.look(bucket)
                bucket.part_with_aliases()

    @unintercepted
    def note_writes(self) -> None:
        """What has been written so far is known of."""
        self._versions = self._now()

    def _now(self) -> list[list[int]]:
        return [list(map(version_of, bucket.params)) for bucket in self.buckets]

    @unintercepted
    def written(self) -> str | None:
        """The name of a parameter that was written since `note_writes`."""
        now = self._now()
        for bucket, here, before in zip(self.buckets, now, self._versions, strict=True):
            for name, version, old in zip(bucket.names, here, before, strict=True):
                if version != old:
                    return name
        return None


class Gathers:
    """What is done with the units of one engine; `blocks` says whether waiting for a collective
    blocks the host.
    """

    def __init__(self, waits: Waits, changes: Changes, rank: int, *, blocks: bool) -> None:
        self._waits = waits
        self._changes = changes
        self._rank = rank
        self._blocks = blocks

    def gather(self, unit: UnitFlight, serial: int) -> None:
        """Starts a unit's all-gathers, once for each `serial`. Raises `CommError` where there is no
        memory.
        """
        self._make_way(unit)
        try:
            unit.gather(serial)
        except (RuntimeError, MemoryError) as error:
            if not _is_lack_of_memory(error):
                raise
            raise CommError(
                f"rank {self._rank}: no memory for the {unit.nbytes} bytes of "
                f"{unit.contents}: give parameters less room, in "
                "zero_optimization.stage3_max_live_parameters, make buckets smaller, or use more "
                f"ranks. {error}"
            ) from error

    def free(self, unit: UnitFlight) -> None:
        """Gives a unit's memory back."""
        self._make_way(unit)
        unit.free(self._changes)

    def land(self, unit: UnitFlight) -> None:
        """Waits for a unit's values."""
        if not self._blocks or unit.under_way:
            with self._waits.waiting(f"all_gather of {unit.contents}"):
                self._land(unit)
        else:
            self._land(unit)

    def _make_way(self, unit: UnitFlight) -> None:
        if self._blocks and unit.under_way:  # elsewhere what follows is enqueued behind it
            with self._waits.waiting(f"all_gather of {unit.contents}"):
                self._land(unit)

    def _land(self, unit: UnitFlight) -> None:
        watch = self._waits.watch
        if not watch.enabled:
            unit.land()
            return
        names = [called(flight) for flight in unit.flights if flight.state is not OVER]
        unit.land()
        for name in names:
            watch.landed(name)

    # What the watch hears.

    def gathering(self, unit: UnitFlight) -> None:
        """Of a Gather."""
        watch = self._waits.watch
        if watch.enabled:
            watch.gathered(unit.unit, unit.nbytes)
            for flight in unit.flights:
                if flight.state.hop == 0 and flight.hop.buffer.nbytes:
                    self._waits.started(flight)  # `Following` tells of what comes behind it

    def freed(self, unit: UnitFlight) -> None:
        """Of a Free."""
        watch = self._waits.watch
        if watch.enabled and not unit.pinned:
            watch.freed(unit.unit.id)


def _is_lack_of_memory(error: Exception) -> bool:
    # torch has a class of its own for an accelerator's memory, and none for the host's
    lacks = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return lacks or "allocate memory" in str(error)
