"""A bucket under way: how it leaves this rank, its memory, and the collectives that use it.

A flight makes its hops one after the other: the reduce-scatter, and where every rank needs the
whole sum the gather that follows. What it guarantees: a hop is made once, started once and taken
once, whatever raises between two of its lines, because its whole state is one attribute and a
`Work` knows by itself whether it has been started. What it does not do: it does not know when its
turn is, nor on which stream it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zerort.device import Lane
from zerort.memory import FlatBucket, Memory
from zerort.mesh import Comm, Work
from zerort.wire import WireFormat

__all__ = ["Hop", "Inflight", "LaneMemory", "Source", "Transport", "lane_for"]


class Source(Protocol):
    """One bucket's gradient on this rank, before it travels."""

    def rest_in(self, slots: list[Tensor]) -> None:
        """Offers the bucket's own send buffer, as one view per parameter, to keep gradients in
        until it is packed.
        """

    def collect(self) -> None:
        """A micro-batch that is not reduced is over."""

    def pack(self, wire: WireFormat, send: Tensor, slots: list[Tensor]) -> list[int]:
        """Encodes the gradient into `send`, of which `slots` are views, one per parameter; `.grad`
        is None afterwards.

        Returns the positions in the bucket of parameters without a gradient; their slots are zero.
        """

    def unreduced(self) -> int:
        """How many parameters have a gradient that has not been packed."""

    def drop(self) -> None:
        """Forgets everything that has not been packed."""

    def reset(self) -> None:
        """The window is over: nobody needs what has been reduced any more."""


@dataclass(frozen=True)
class Transport:
    """How one bucket leaves this rank: where its gradient waits, and how it is encoded."""

    source: Source
    wire: WireFormat
    predivide: float = 1.0
    """What gradients are divided by before the sum over ranks, and multiplied by after it."""


class Hop(Protocol):
    """One collective of a bucket, and the arithmetic before and after it."""

    name: str
    """Of the collective, for errors and traces."""

    def make(self, flight: Inflight) -> Work:
        """Writes what is to travel, and returns the collective, not started."""

    def size(self, flight: Inflight) -> int:
        """Bytes of the buffer that travels."""

    def take(self, flight: Inflight) -> None:
        """The collective is complete: its result goes where it belongs."""


class State(NamedTuple):
    """Where a flight is: at its hop number `hop`, whose collective has been made if there is a
    `work`.
    """

    hop: int
    work: Work | None


IDLE = State(0, None)


class Inflight:
    """A bucket's send and receive memory and its hops.

    `before` is who used the same memory last, this pass or the one before; None where nobody else
    does.
    """

    __slots__ = (
        "before",
        "bucket",
        "hops",
        "lane",
        "own",
        "recv",
        "send",
        "slots",
        "state",
        "transport",
    )

    def __init__(
        self, bucket: FlatBucket, transport: Transport, lane: LaneMemory, comm: Comm
    ) -> None:
        numel, shard, dtype = bucket.spec.numel, bucket.spec.shard_numel, transport.wire.dtype
        self.bucket = bucket
        self.transport = transport
        self.lane = lane.lane
        self.before: Inflight | None = None
        self.hops: Sequence[Hop] = ()
        self.state = IDLE
        self.send = lane.send.typed(dtype, 0, numel).tensor
        self.own = lane.send.typed(dtype, comm.rank * shard, shard)
        # Where the sum happens on the way, it lands in place: on this rank's slice of what it sent.
        self.recv = lane.recv.typed(dtype, 0, numel) if lane.recv else self.own
        self.slots = bucket.slots(self.send)
        if not lane.shared:
            transport.source.rest_in(self.slots)

    @property
    def narrows(self) -> bool:
        """Whether the sum is gathered in fewer bytes than it is kept in: from where the gradients
        were sent.
        """
        return self.send.itemsize < self.bucket.accum.tensor.itemsize

    @property
    def gathered(self) -> Tensor:
        """Where all ranks' sums come together (numel,)."""
        return self.send if self.narrows else self.bucket.accum.tensor

    @property
    def under_way(self) -> bool:
        """Whether this flight's collective, or that of the one before in this memory, is not
        complete.
        """
        works = (self.state.work, self.before.state.work if self.before is not None else None)
        return any(work is not None and not work.is_completed() for work in works)

    @property
    def hop(self) -> Hop:
        """The hop it is at."""
        return self.hops[self.state.hop]

    def start(self) -> None:
        """Makes and starts the hop it is at, once; nothing where that has been done."""
        hop, work = self.state
        if work is None:
            work = self.hops[hop].make(self)
            self.state = State(hop, work)
        work.start()

    def take(self) -> None:
        """Takes the result of the hop it is at, whose collective is complete, and goes to the
        next.
        """
        self.hop.take(self)
        self.pass_over()

    def pass_over(self) -> None:
        """Goes to the next hop without the result."""
        following = self.state.hop + 1
        self.state = State(following, None) if following < len(self.hops) else IDLE

    def pack(self) -> list[str]:
        """Encodes the bucket's gradient; returns the names of parameters that had none."""
        if self.before is not None:
            self.send.zero_()  # it had its padding elsewhere
        absent = self.transport.source.pack(self.transport.wire, self.send, self.slots)
        if self.transport.predivide != 1.0:
            self.send.div_(self.transport.predivide)
        return [self.bucket.names[i] for i in absent if self.bucket.params[i].requires_grad]


@dataclass(frozen=True)
class LaneMemory:
    """Memory for one bucket in flight; buckets that follow one another at the window's distance
    share it.
    """

    send: Memory
    recv: Memory | None
    lane: Lane
    """When the device is done with it."""
    shared: bool


def lane_for(
    users: Sequence[FlatBucket], transports: Sequence[Transport], comm: Comm, lane: Lane
) -> LaneMemory:
    """Memory for the largest of `users`, which are in flight one after the other."""
    sizes = (b.spec.numel * t.wire.dtype.itemsize for b, t in zip(users, transports, strict=True))
    size = max(sizes)
    send = Memory.zeros(size, torch.uint8, comm.device)
    recv = Memory.zeros(size, torch.uint8, comm.device) if comm.chunks > 1 else None
    return LaneMemory(send, recv, lane, shared=len(users) > 1)
