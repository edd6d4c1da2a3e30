"""Between the shards of exchanged parameters and the rooms of their owners: once a boundary one
all-to-all for each dtype brings every reduced gradient whole to its owner, and another the updated
parameter's parts back into the shards, from where they are published as ever.

What it guarantees: all ranks make the same collectives in one order, also with nothing to send; an
element that is not on its owner goes once each way, as the plan says; memory for what is on its way
is there before ranks vote, so that behind the vote none is asked for. What it does not do: it does
not know what a step is, nor what steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zerort import _core
from zerort.memory import DTYPES, FlatBucket, FlatModel, Room, Side, exchanged, unintercepted
from zerort.mesh import Comm, Work
from zerort.run.waits import Waits
from zerort.trace import TraceSink

__all__ = ["Exchange"]

OfShard = Callable[[FlatBucket], Side]
"""Something of a bucket, in the layout of this rank's shard."""
OfRoom = Callable[[Room], Side]


class Exchange:
    """Of one plan; where it exchanges nothing, every call does nothing."""

    def __init__(
        self, plan: _core.Plan, flat: FlatModel, comm: Comm, waits: Waits, sink: TraceSink
    ) -> None:
        ways = {spec.id for spec in exchanged(plan)}
        self._buckets = [bucket for bucket in flat.trained if bucket.spec.id in ways]
        self._rooms = list(flat.rooms.values())
        self._routes = [
            Route(exchange, self._buckets, flat.rooms, comm)
            for exchange in (plan.exchanges(comm.rank) if ways else ())
        ]
        self._comm, self._waits, self._sink = comm, waits, sink

    @property
    def sent(self) -> tuple[int, int]:
        """Bytes that this rank sends at a boundary: of gradients, and of parameters."""
        there = sum(sum(route.leaving) * route.sums.itemsize for route in self._routes)
        back = sum(sum(route.arriving) * route.values.itemsize for route in self._routes)
        return there, back

    # At the boundary.

    def prepare(self) -> None:
        """Memory for the boundary, before ranks vote."""
        for room in self._rooms:
            room.open()
        for route in self._routes:
            route.open()

    def release(self) -> None:
        """Gives it back."""
        for room in self._rooms:
            room.close()
        for route in self._routes:
            route.close()

    @unintercepted
    def written(self) -> bool:
        """Whether something outside a step has written into this rank's parts."""
        return any(bucket.away.written() for bucket in self._buckets if bucket.away is not None)

    def gradients(self) -> None:
        """Reduced gradients come whole into the rooms, behind `prepare`."""
        with self._crossing("gradients") as cross:
            cross([r.to_owners(_summed, _reduced, r.sums) for r in self._routes])

    def values(self) -> None:
        """Updated parameters go from the rooms into the shards, in their own dtype."""
        for bucket in self._buckets:
            bucket.ready()
        with self._crossing("parameters") as cross, torch.no_grad():
            cross([r.to_holders(_kept, _part, r.values) for r in self._routes])
        for bucket in self._buckets:
            bucket.own.replaced()
            if bucket.away is not None:
                bucket.away.lead()
        for room in self._rooms:
            room.sent()
        self.release()

    # Between two boundaries; all ranks call these together.

    def follow(self) -> None:
        """The masters become the parameters as they are."""
        found = self._values_whole(_part)
        for room in self._rooms:
            room.follow(found[room.spec.id])
        for bucket in self._buckets:
            if bucket.away is not None:
                bucket.away.lead()

    def take_writes(self, written: bool | None = None) -> None:
        """The masters follow what has been `written` outside a step on any rank; by default ranks
        ask one another.
        """
        if not self._routes or not (self._any_written() if written is None else written):
            return
        found = self._values_whole(_part)
        noted = self._values_whole(_noted) if any(map(_has_noted, self._buckets)) else {}
        with torch.no_grad():
            for room in self._rooms:
                basis = noted[room.spec.id] if _has_noted(room.bucket) else None
                room.take_writes(found[room.spec.id], basis)
        for bucket in self._buckets:
            if _has_noted(bucket):
                bucket.note_writes()
            elif bucket.away is not None:
                bucket.away.see()

    def _any_written(self) -> bool:
        flag = torch.tensor([float(self.written())], dtype=torch.float64)
        self._comm.control.all_reduce(flag)
        return bool(flag.item())

    def _values_whole(self, of: OfShard) -> dict[int, Tensor]:
        """Exchanged parameters whole in the layout of this rank's rooms, by bucket."""
        for bucket in self._buckets:
            bucket.ready()
        found = {room.spec.id: room.fresh() for room in self._rooms}

        def into(room: Room) -> Side:
            return found[room.spec.id]

        with self._crossing("parameters as they are") as cross, torch.no_grad():
            cross([r.to_owners(of, into, r.values) for r in self._routes])
        for route in self._routes:
            route.close()
        return {number: side.tensor for number, side in found.items()}

    # How it goes.

    @contextmanager
    def _crossing(self, what: str) -> Iterator[Callable[[Sequence[Crossing]], None]]:
        if not self._routes:
            yield lambda _: None
            return
        with self._sink.range(f"exchange {what}"), self._waits.naming(f"all_to_all of {what}"):
            yield lambda crossings: self._cross(what, crossings)

    def _cross(self, what: str, crossings: Sequence[Crossing]) -> None:
        watch = self._waits.watch
        for number, crossing in enumerate(crossings):
            crossing.work.start()
            if watch.enabled:
                watch.started(f"all_to_all {what} {number}", crossing.nbytes, crossing.work)
        for crossing in crossings:
            crossing.here.copy()
        for number, crossing in enumerate(crossings):
            with self._waits.waiting(f"exchanged {what}"):
                crossing.work.wait()
            if watch.enabled:
                watch.landed(f"all_to_all {what} {number}")
            crossing.there.copy()


class Copies(NamedTuple):
    """Pieces of memory, and what they become, in their own dtypes and places."""

    into: Sequence[Side]
    source: Sequence[Side]

    def copy(self) -> None:
        """All of them; the host waits where some are its own, beside a device."""
        pairs = list(zip(self.into, self.source, strict=True))
        near = [(a.tensor, b.tensor) for a, b in pairs if (a.host is None) == (b.host is None)]
        far = [(a, b) for a, b in pairs if (a.host is None) != (b.host is None)]
        if near:
            torch._foreach_copy_([into for into, _ in near], [source for _, source in near])
        for mark in [into.copy_(source) for into, source in far]:
            if mark is not None:
                mark.wait()


@dataclass(frozen=True)
class Crossing:
    """One all-to-all that is ready to start, and what is copied around it."""

    work: Work
    nbytes: int
    """That this rank sends."""
    here: Copies
    """What stays on this rank."""
    there: Copies
    """What arrives, and where it belongs."""


class InShard(NamedTuple):
    """A run of elements in this rank's shard of a bucket."""

    bucket: FlatBucket
    start: int
    length: int

    def of(self, parts: dict[int, Side]) -> Side:
        """It, of memory by bucket."""
        return parts[self.bucket.spec.id].part(self.start, self.length)


class InRoom(NamedTuple):
    """A run of elements in this rank's room of a bucket."""

    room: Room
    start: int
    length: int

    def of(self, parts: dict[int, Side]) -> Side:
        """It, of memory by bucket."""
        return parts[self.room.spec.id].part(self.start, self.length)


class Route:
    """The ways of one dtype's elements between this rank and all others."""

    def __init__(
        self,
        exchange: _core.Exchange,
        buckets: Sequence[FlatBucket],
        rooms: dict[int, Room],
        comm: Comm,
    ) -> None:
        self.leaving, self.arriving = exchange.send_splits, exchange.recv_splits
        """Elements of gradients to each rank, and from each."""
        by_id = {bucket.spec.id: bucket for bucket in buckets}
        starts = dict(exchange.places)
        bases = {
            number: min((starts[p] for p in bucket.spec.params if p in starts), default=0)
            for number, bucket in by_id.items()
        }

        def held(row: tuple[int, int, int, int, int]) -> InShard:
            return InShard(by_id[row[0]], row[2], row[4])

        def owned(row: tuple[int, int, int, int, int]) -> InRoom:
            return InRoom(rooms[row[0]], row[3] - bases[row[0]], row[4])

        self._send = [held(row) for row in exchange.send]
        self._recv = [owned(row) for row in exchange.recv]
        self._kept = [(held(row), owned(row)) for row in exchange.kept]
        own = [b for b in buckets if DTYPES[rooms[b.spec.id].dtype] == exchange.dtype]
        self._buckets, self._rooms = own, [rooms[bucket.spec.id] for bucket in own]
        self.values = self._rooms[0].dtype
        """What parameters are in."""
        self.sums = own[0].accum.tensor.dtype
        """What gradients are added up in."""
        self._comm = comm
        self._memory: tuple[Tensor, Tensor] | None = None

    def open(self) -> tuple[Tensor, Tensor]:
        """Bytes for what leaves the shards and for what leaves the rooms, or arrives there."""
        if self._memory is None:
            item = max(self.sums.itemsize, self.values.itemsize)
            near, far = (
                torch.empty(sum(splits) * item, dtype=torch.uint8, device=self._comm.device)
                for splits in (self.leaving, self.arriving)
            )
            self._memory = near, far
        return self._memory

    def close(self) -> None:
        """Gives it back."""
        self._memory = None

    def to_owners(self, of: OfShard, into: OfRoom, dtype: torch.dtype) -> Crossing:
        """From shards to rooms, in `dtype`."""
        shards, rooms, near, far = self._parts(of, into, dtype)
        Copies(_cut(near, self._send), [run.of(shards) for run in self._send]).copy()
        return Crossing(
            self._comm.all_to_all(far, near, self.arriving, self.leaving),
            near.nbytes,
            Copies([o.of(rooms) for _, o in self._kept], [h.of(shards) for h, _ in self._kept]),
            Copies([run.of(rooms) for run in self._recv], _cut(far, self._recv)),
        )

    def to_holders(self, of: OfRoom, into: OfShard, dtype: torch.dtype) -> Crossing:
        """From rooms to shards, in `dtype`."""
        shards, rooms, near, far = self._parts(into, of, dtype)
        Copies(_cut(far, self._recv), [run.of(rooms) for run in self._recv]).copy()
        return Crossing(
            self._comm.all_to_all(near, far, self.leaving, self.arriving),
            far.nbytes,
            Copies([h.of(shards) for h, _ in self._kept], [o.of(rooms) for _, o in self._kept]),
            Copies([run.of(shards) for run in self._send], _cut(near, self._send)),
        )

    def _parts(
        self, shard: OfShard, room: OfRoom, dtype: torch.dtype
    ) -> tuple[dict[int, Side], dict[int, Side], Tensor, Tensor]:
        near, far = self.open()
        return (
            {bucket.spec.id: shard(bucket) for bucket in self._buckets},
            {each.spec.id: room(each) for each in self._rooms},
            near.view(dtype).narrow(0, 0, sum(self.leaving)),
            far.view(dtype).narrow(0, 0, sum(self.arriving)),
        )


def _cut(flat: Tensor, runs: Sequence[InShard] | Sequence[InRoom]) -> Sequence[Side]:
    return [*map(Side, torch.split(flat, [run.length for run in runs]))] if runs else ()


def _summed(bucket: FlatBucket) -> Side:
    return bucket.summed


def _part(bucket: FlatBucket) -> Side:
    return bucket.part


def _noted(bucket: FlatBucket) -> Side:
    return bucket.noted


def _reduced(room: Room) -> Side:
    return room.reduced


def _kept(room: Room) -> Side:
    return room.kept


def _has_noted(bucket: FlatBucket) -> bool:
    return bucket.away is not None and bucket.away.noted is not None
