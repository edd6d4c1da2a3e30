"""A bucket under way: how it leaves this rank, its memory, and the collective that uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zerort.memory import FlatBucket, Memory
from zerort.mesh import Comm, Work
from zerort.wire import WireFormat

__all__ = ["Inflight", "Lane", "Source", "Transport", "lane_for"]


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

    def leftover(self) -> int:
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


class Inflight:
    """A bucket's send and receive memory and the collective that uses them.

    From Launch to Retire; where sums are gathered, until they are. `before` is who used the same
    memory last, this pass or the one before; None where nobody else does.
    """

    __slots__ = ("before", "bucket", "own", "recv", "send", "slots", "transport", "work")

    def __init__(self, bucket: FlatBucket, transport: Transport, lane: Lane, comm: Comm) -> None:
        numel, shard, dtype = bucket.spec.numel, bucket.spec.shard_numel, transport.wire.dtype
        self.bucket = bucket
        self.transport = transport
        self.before: Inflight | None = None
        self.send = lane.send.typed(dtype, 0, numel).tensor
        self.own = lane.send.typed(dtype, comm.rank * shard, shard)
        # Where the sum happens on the way, it lands in place: on this rank's slice of what it sent.
        self.recv = lane.recv.typed(dtype, 0, numel) if lane.recv else self.own
        self.slots = bucket.slots(self.send)
        if not lane.shared:
            transport.source.rest_in(self.slots)
        self.work: Work | None = None

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
    def must_wait(self) -> bool:
        """Whether this flight's collective is under way, or the one before needs the memory."""
        works = (self.work, self.before.work if self.before is not None else None)
        return any(work is not None and not work.is_completed() for work in works)

    def pack(self) -> list[str]:
        """Encodes the bucket's gradient; returns the names of parameters that had none."""
        if self.before is not None:
            self.send.zero_()  # it had its padding elsewhere
        absent = self.transport.source.pack(self.transport.wire, self.send, self.slots)
        if self.transport.predivide != 1.0:
            self.send.div_(self.transport.predivide)
        return [self.bucket.names[i] for i in absent if self.bucket.params[i].requires_grad]


@dataclass(frozen=True)
class Lane:
    """Memory for one bucket in flight; buckets that follow one another at the window's distance
    share it.
    """

    send: Memory
    recv: Memory | None
    shared: bool


def lane_for(users: Sequence[FlatBucket], transports: Sequence[Transport], comm: Comm) -> Lane:
    """Memory for the largest of `users`, which are in flight one after the other."""
    sizes = (b.spec.numel * t.wire.dtype.itemsize for b, t in zip(users, transports, strict=True))
    size = max(sizes)
    send = Memory.zeros(size, torch.uint8, comm.device)
    recv = Memory.zeros(size, torch.uint8, comm.device) if comm.chunks > 1 else None
    return Lane(send, recv, shared=len(users) > 1)
