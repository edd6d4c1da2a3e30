"""A bucket under way: how it leaves this rank, and the collectives that it goes through.

A flight makes the hops that were planned for its bucket one after the other. What it guarantees: a
hop is made once, started once and taken once, whatever raises between two of its lines, because its
whole state is one attribute and a `Work` knows by itself whether it has been started. What it does
not do: it does not know when its turn is, nor on which stream it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from zerort.device import Lane
from zerort.memory import FlatBucket, HeldBucket
from zerort.mesh import Work
from zerort.wire import Encoder, Extent, WireFormat

__all__ = ["FIRST", "OVER", "Flight", "Hop", "Inflight", "Leg", "Source", "Transport"]


class Source(Protocol):
    """One bucket's gradient on this rank, before it is sent."""

    def rest_in(self, slots: Callable[[], Sequence[Tensor]] | None) -> None:
        """Offers the bucket's own send buffer, as one view per parameter, to keep gradients in
        until it is packed: `slots` says where that is between two passes. Without any there is no
        such memory.
        """

    def follow(self) -> None:
        """The bucket's memory lies elsewhere; nothing waits. What is needed only where gradients
        have to is given back.
        """

    def collect(self) -> None:
        """A micro-batch that is not reduced is over."""

    def waiting(self, position: int) -> Tensor | None:
        """A copy of what waits of the parameter at that position in the bucket, in its shape and
        the dtype in which it waits. None where nothing does.
        """

    def replace(self, position: int, value: Tensor) -> None:
        """Writes `value`, of the parameter's shape, over it. Something waits there."""

    def pack(self, encoder: Encoder) -> list[int]:
        """Encodes the gradient; `.grad` is None afterwards.

        Returns the positions in the bucket of parameters without a gradient, which counts as zero.
        """

    def unreduced(self) -> int:
        """How many parameters have a gradient that has not been packed."""

    def drop(self) -> None:
        """Forgets everything that has not been packed."""

    def reset(self) -> None:
        """The window is over: what has been reduced is not needed any more."""


@dataclass(frozen=True)
class Leg:
    """One of the reductions that a bucket's gradient goes through: among the ranks of `group`."""

    group: str
    extent: Extent
    wire: WireFormat
    encoder: Encoder


@dataclass(frozen=True)
class Transport:
    """How one bucket leaves this rank: where its gradient waits, and how it is encoded on each leg.
    The first takes the gradient of the whole bucket in, each of the others what the one before has
    summed.
    """

    source: Source
    legs: Sequence[Leg]

    @property
    def encoders(self) -> Sequence[Encoder]:
        """Of all legs."""
        return [leg.encoder for leg in self.legs]


class Hop(Protocol):
    """One collective of a bucket, and the arithmetic before and after it."""

    name: str
    """Of the collective, for errors and traces."""

    @property
    def buffer(self) -> Tensor:
        """What is sent."""

    def make(self) -> Work:
        """Writes what is to be sent, and returns the collective, not started."""

    def take(self) -> None:
        """The collective is complete: its result goes where it belongs."""


class State(NamedTuple):
    """Where a flight is: at its hop number `hop`, whose collective has been made if there is a
    `work`.
    """

    hop: int
    work: Work | None


FIRST = State(0, None)
OVER = State(-1, None)
"""Behind the last hop."""


class Flight:
    """A bucket on its way through its hops."""

    __slots__ = ("bucket", "hops", "state")

    def __init__(self, bucket: HeldBucket, hops: Sequence[Hop]) -> None:
        self.bucket = bucket
        self.hops = hops
        self.state = FIRST if hops else OVER

    @property
    def hop(self) -> Hop:
        """The hop it is at."""
        return self.hops[self.state.hop]

    def start(self) -> Work:
        """Makes and starts the hop it is at, once; nothing where that has been done."""
        hop, work = self.state
        if work is None:
            work = self.hops[hop].make()
            self.state = State(hop, work)
        return work.start()

    def take(self) -> None:
        """Takes the result of the hop it is at, whose collective is complete, and goes to the
        next.
        """
        self.hop.take()
        self.pass_over()

    def pass_over(self) -> None:
        """Goes to the next hop without the result."""
        if self.state.work is not None:
            self.state.work.taken()
        following = self.state.hop + 1
        self.state = State(following, None) if following < len(self.hops) else OVER


class Inflight(Flight):
    """A bucket's gradient on its way, pass after pass, in the memory of a lane.

    `before` is who used the same memory last, this pass or the one before; None where nothing else
    does.
    """

    __slots__ = ("before", "lane")

    def __init__(self, bucket: FlatBucket, hops: Sequence[Hop], lane: Lane) -> None:
        super().__init__(bucket, hops)
        self.lane = lane
        self.before: Inflight | None = None

    @property
    def under_way(self) -> bool:
        """Whether this flight's collective, or that of the one before in this memory, is not
        complete.
        """
        works = (self.state.work, self.before.state.work if self.before is not None else None)
        return any(work is not None and not work.is_completed() for work in works)
