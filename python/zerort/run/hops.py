"""The collectives of a bucket, and the arithmetic around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from zerort import _core
from zerort.device import device_for
from zerort.memory import FlatBucket, HeldBucket, Memory, Secondary
from zerort.mesh import Comm, GatherMemory, Mesh, Work
from zerort.run import nonfinite
from zerort.run.flight import Hop, Leg, Source, Transport
from zerort.run.lanes import LaneMemory, LegMemory
from zerort.run.secondary import Ways
from zerort.wire import Encoder

__all__ = [
    "Fold",
    "GatherSums",
    "GatherValues",
    "Pass",
    "ReduceScatter",
    "gather_hops",
    "gather_ways",
    "reduce_hops",
]


@dataclass(frozen=True)
class Fold:
    """How a pass ends up in the accumulators: times `scale`, onto what is there if `add`."""

    scale: float
    add: bool


@dataclass
class Pass:
    """The run of the list that is under way; `nonfinite` and `failure` hold until the accumulation
    window is over.
    """

    fold: Fold = Fold(1.0, add=False)
    absent: list[str] = field(default_factory=list)
    """Parameters that require grad and had none."""
    nonfinite: tuple[int, int] | None = None
    """(rank, parameter) of the first infinity or NaN that arrived."""
    failure: str | None = None
    """What broke off on this rank. From then on zeros are sent and results are not taken: peers
    find a partner for each of their collectives, and the vote drops the window on all ranks.
    """

    def poison(self, failure: str) -> None:
        """The window is lost on this rank: what is left of the list runs on zeros."""
        self.failure = self.failure or failure

    def lose(self, error: BaseException) -> None:
        """It is lost by what has been raised between two lines."""
        self.poison(f"{type(error).__name__}: {error}")

    def reset(self) -> None:
        """The window is over."""
        self.nonfinite = self.failure = None


Feed = Callable[[Encoder], None]
"""Has what a leg sends encoded."""


@dataclass(frozen=True)
class FromGradients:
    """What is sent is the bucket's gradient, as it waits on this rank."""

    bucket: FlatBucket
    source: Source
    current: Pass

    def __call__(self, encoder: Encoder) -> None:
        """Packs the gradients."""
        if self.current.failure is None:
            absent = self.source.pack(encoder)
            names, params = self.bucket.names, self.bucket.params
            self.current.absent += [names[i] for i in absent if params[i].requires_grad]
        else:
            encoder.clear()


@dataclass(frozen=True)
class FromSums:
    """What is sent has been summed on the leg before."""

    sums: Memory
    current: Pass

    def __call__(self, encoder: Encoder) -> None:
        """Encodes them."""
        if self.current.failure is None:
            encoder.encode_flat(self.sums.tensor)
        else:
            encoder.clear()


Sink = Callable[[Encoder], "float | Tensor"]
"""Has what arrived summed; returns the squared norm of the sum."""


@dataclass(frozen=True)
class IntoShard:
    """The sum is this rank's shard, or is added to what earlier passes have left there."""

    bucket: FlatBucket
    current: Pass

    def __call__(self, encoder: Encoder) -> float | Tensor:
        """Into the accumulator."""
        bucket, fold = self.bucket, self.current.fold
        into = bucket.sums.open(add=fold.add)
        bucket.squares = encoder.decode(into, scale=fold.scale, add=fold.add)
        bucket.sums.close()
        return bucket.squares


@dataclass(frozen=True)
class IntoSums:
    """The sum is what the next leg sends from its beginning on; the rest counts as zero."""

    sums: Memory
    rest: Tensor

    @classmethod
    def over(cls, memory: Memory, numel: int) -> IntoSums:
        """The first `numel` elements of what is sent."""
        start = memory.tensor
        return cls(Memory.of(start.narrow(0, 0, numel)), start.narrow(0, numel, len(start) - numel))

    def __call__(self, encoder: Encoder) -> float | Tensor:
        """As it is, unscaled."""
        self.rest.zero_()  # other buckets, which are longer, may have written there
        return encoder.decode(self.sums, scale=1.0, add=False)


@dataclass(frozen=True)
class IntoTotals:
    """The sum is this rank's piece of what copies of the model state have together."""

    own: Memory
    current: Pass

    def __call__(self, encoder: Encoder) -> float | Tensor:
        """Scaled, so that it may be rounded."""
        return encoder.decode(self.own, scale=self.current.fold.scale, add=False)


class ReduceScatter:
    """From what a leg sends to its sum, of this rank's piece."""

    name = "reduce_scatter"
    __slots__ = ("_comm", "_current", "_feed", "_leg", "_memory", "_sink", "turn")

    def __init__(
        self, comm: Comm, leg: Leg, memory: LegMemory, feed: Feed, sink: Sink, current: Pass
    ) -> None:
        self._comm, self._leg, self._memory = comm, leg, memory
        self._feed, self._sink, self._current = feed, sink, current
        self.turn = memory.turns[0]
        """What it uses, or has used last."""

    @property
    def buffer(self) -> Tensor:
        """What is sent, encoded."""
        return self.turn.buffers.send.tensor

    def slots(self) -> Sequence[Tensor]:
        """Where gradients may rest until they are packed, in what is used next; nothing is under
        way.
        """
        encoder = self._leg.encoder
        encoder.bind(self._memory.next().buffers)
        return encoder.slots

    def gathers(self, nbytes: int) -> GatherMemory:
        """For what is gathered of its sums."""
        return self._memory.memory.gathers(nbytes)

    def make(self) -> Work:
        """Writes it."""
        turn = self.turn = self._memory.next()
        encoder = self._leg.encoder
        encoder.bind(turn.buffers)
        self._feed(encoder)
        return turn.scatter.make(lost=self._current.failure is not None)

    def take(self) -> None:
        """Sums what arrived."""
        squares = self._sink(self._leg.encoder)
        if (
            isinstance(squares, float)
            and not math.isfinite(squares)
            and self._current.nonfinite is None
        ):
            pieces = self.turn.buffers.pieces
            self._current.nonfinite = nonfinite.in_arrival(self._leg, pieces, self._comm)


@dataclass(frozen=True)
class GatherSums:
    """From each rank's sums to all of them on every rank, where each has the whole optimizer; of a
    leg's extent, which `scatter` has summed.
    """

    memory: GatherMemory
    leg: Leg
    scatter: ReduceScatter
    current: Pass

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """Where all ranks' sums come together."""
        extent = self.leg.extent
        if self.leg.encoder.rounds:
            return self.scatter.buffer
        return extent.bucket.accum.tensor.narrow(0, extent.start, extent.numel)

    def make(self) -> Work:
        """Rounds the sum to what is sent."""
        if self.leg.encoder.rounds:
            # What every rank will step with is the rounded sum, so the norm is that one's.
            bucket = self.leg.extent.bucket
            bucket.squares = self.leg.encoder.round(bucket.reduced_shard)
        return self.memory.make(self.buffer, lost=self.current.failure is not None)

    def take(self) -> None:
        """Widens the sums where they were rounded."""
        if self.leg.encoder.rounds:
            extent = self.leg.extent
            accum = extent.bucket.accum
            if extent.numel < accum.tensor.numel():
                accum = Memory.of(accum.tensor.narrow(0, extent.start, extent.numel))
            self.leg.encoder.spread(accum)


@dataclass(frozen=True)
class GatherTotals:
    """From the pieces of a shard that copies of the model state have summed to the whole of it on
    each, and into the accumulator: the second half of their all-reduce.
    """

    comm: Comm
    memory: GatherMemory
    leg: Leg
    scatter: ReduceScatter
    totals: Memory
    """(extent's numel,)"""
    current: Pass

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """Where the pieces come together."""
        return self.scatter.buffer if self.leg.encoder.rounds else self.totals.tensor

    def make(self) -> Work:
        """Rounds this rank's piece to what is sent."""
        if self.leg.encoder.rounds:
            extent = self.leg.extent
            start = self.comm.rank * extent.shard_numel
            own = self.totals.tensor.narrow(0, start, extent.shard_numel)
            self.leg.encoder.round(Memory.of(own))
        return self.memory.make(self.buffer, lost=self.current.failure is not None)

    def take(self) -> None:
        """Adds it to what earlier passes have left, as all copies do."""
        if self.leg.encoder.rounds:
            self.leg.encoder.spread(self.totals)
        bucket, add = self.leg.extent.bucket, self.current.fold.add
        into = bucket.sums.open(add=add)
        numel = into.tensor.numel()
        total = Memory.of(self.totals.tensor.narrow(0, 0, numel))
        device = device_for(self.comm.device)
        bucket.squares = device.reduce(total, into, world=1, stride=numel, scale=1.0, add=add)
        bucket.sums.close()


def gather_sums(leg: Leg, scatter: ReduceScatter, current: Pass) -> GatherSums:
    """In the memory that they were scattered in. All ranks make it, in one order, with nothing
    under way.
    """
    each = leg.extent.numel * leg.extent.bucket.accum.tensor.itemsize
    nbytes = scatter.buffer.nbytes if leg.encoder.rounds else each
    return GatherSums(scatter.gathers(nbytes // leg.extent.world), leg, scatter, current)


@dataclass(frozen=True)
class GatherValues:
    """From each rank's part of the parameters to all of them on every rank; of the bucket's
    elements from `start` on, `numel` of them, where not all ranks' parts are gathered at once.
    """

    memory: GatherMemory
    bucket: HeldBucket
    start: int
    numel: int
    last: bool
    """Whether the bucket is whole then."""

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """The parameters themselves, or the memory that is to be theirs."""
        return self.bucket.values.landing.narrow(0, self.start, self.numel)

    def make(self) -> Work:
        """Nothing to write: this rank's part is in its place."""
        return self.memory.make(self.buffer, lost=False)

    def take(self) -> None:
        """Nothing to read: parameters are views of what has come."""
        if self.last:
            self.bucket.values.land()


def gather_hops(bucket: HeldBucket, planned: Sequence[_core.Hop], mesh: Mesh) -> list[Hop]:
    """What brings a bucket's parameters to this rank, from its shard on; one that moves nothing
    where the shard is all. With memory of their own: all ranks make them, in one order, with
    nothing under way.
    """
    hops: list[Hop] = []
    start, numel = 0, bucket.spec.numel
    if not planned:
        return [GatherValues(mesh["own"].gather_memory(0), bucket, start, numel, last=True)]
    for hop in reversed(planned):
        comm = mesh[hop.group]
        memory = comm.gather_memory(numel // comm.world * bucket.owned.tensor.itemsize)
        hops.insert(0, GatherValues(memory, bucket, start, numel, last=not hops))
        numel //= comm.world
        start += comm.rank * numel
    return hops


def gather_ways(buckets: Sequence[HeldBucket], mesh: Mesh) -> Ways:
    """What brings the buckets of a unit, as `gather_hops` has it; from what the host has had, where
    that is kept.
    """
    far = [gather_hops(bucket, bucket.spec.gather_hops, mesh) for bucket in buckets]
    secondaries: list[Secondary] = []
    for bucket, hops in zip(buckets, far, strict=True):
        between = hops[0]
        if len(hops) > 1 and isinstance(between, GatherValues):
            kept = bucket.keep_secondary(between.start, between.numel)
            secondaries += [] if kept is None else [kept]
    return Ways(far, secondaries, mesh["own"].gather_memory(0))


def reduce_hops(
    bucket: FlatBucket, transport: Transport, lane: LaneMemory, mesh: Mesh, current: Pass
) -> list[Hop]:
    """Those of one bucket's gradient, in the order in which they run."""
    hops: list[Hop] = []
    scatters: dict[str, ReduceScatter] = {}
    legs = {leg.group: (number, leg) for number, leg in enumerate(transport.legs)}
    for hop in bucket.spec.reduce_hops:
        number, leg = legs[hop.group]
        comm = mesh[hop.group]
        if hop.op == "all_gather":
            hops.append(gather_sums(leg, scatters[hop.group], current))
            continue
        feed: Feed = FromGradients(bucket, transport.source, current)
        if number > 0:
            feed = FromSums(lane.sums(number, leg), current)
        sink: Sink = IntoShard(bucket, current)
        totals = None
        if number + 1 < len(transport.legs):
            following = lane.sums(number + 1, transport.legs[number + 1])
            sink = IntoSums.over(following, leg.extent.shard_numel)
        elif hop.op == "all_reduce":
            totals = lane.totals(leg)
            own = totals.tensor.chunk(comm.world)[comm.rank]
            sink = IntoTotals(Memory.of(own), current)
        memory = lane.leg(number, leg, comm)
        leg.encoder.bind(memory.turns[0].buffers)
        scatter = scatters[hop.group] = ReduceScatter(comm, leg, memory, feed, sink, current)
        hops.append(scatter)
        if number == 0:
            transport.source.rest_in(scatter.slots)
        if totals is not None:
            gathers = scatter.gathers(totals.tensor.nbytes // comm.world)
            hops.append(GatherTotals(comm, gathers, leg, scatter, totals, current))
    return hops
