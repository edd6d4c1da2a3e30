"""The collectives of a bucket, and the arithmetic around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from zerort.memory import FlatBucket, HeldBucket, Memory
from zerort.mesh import Comm, GatherMemory, Mesh, Work
from zerort.run import nonfinite
from zerort.run.flight import Hop, Leg, Source, Transport
from zerort.run.lanes import LaneMemory, LegMemory
from zerort.wire import Encoder

__all__ = ["PUBLISH", "Fold", "Pass", "gather_values", "reduce_hops"]


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
    """The sum is what the next leg sends."""

    sums: Memory

    def __call__(self, encoder: Encoder) -> float | Tensor:
        """As it is, unscaled."""
        return encoder.decode(self.sums, scale=1.0, add=False)


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
        rounds = self.leg.encoder.rounds
        return self.scatter.buffer if rounds else self.leg.extent.bucket.accum.tensor

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
            self.leg.encoder.spread(self.leg.extent.bucket.accum)


def gather_sums(comm: Comm, leg: Leg, scatter: ReduceScatter, current: Pass) -> GatherSums:
    """With memory of its own. All ranks of `comm` make it, in one order, with nothing under way."""
    buffer = scatter.buffer if leg.encoder.rounds else leg.extent.bucket.accum.tensor
    return GatherSums(comm.gather_memory(buffer.nbytes // comm.world), leg, scatter, current)


@dataclass(frozen=True)
class GatherValues:
    """From each rank's part of the parameters to all of them on every rank."""

    memory: GatherMemory
    bucket: HeldBucket

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """The parameters themselves, or the memory that is to be theirs."""
        return self.bucket.values.landing

    def make(self) -> Work:
        """Nothing to write: this rank's part is in its place."""
        return self.memory.make(self.buffer, lost=False)

    def take(self) -> None:
        """Nothing to read: parameters are views of what has come."""
        self.bucket.values.land()


def gather_values(comm: Comm, bucket: HeldBucket) -> GatherValues:
    """With memory of its own. All ranks of `comm` make it, in one order, with nothing under way."""
    nbytes = bucket.spec.numel * bucket.owned.tensor.itemsize
    return GatherValues(comm.gather_memory(nbytes // comm.world), bucket)


PUBLISH: dict[str, Callable[[Comm, FlatBucket], Hop]] = {"all_gather": gather_values}
"""What makes the hops that the core plans, by their `op`."""


def reduce_hops(
    bucket: FlatBucket, transport: Transport, lane: LaneMemory, mesh: Mesh, current: Pass
) -> list[Hop]:
    """Those of one bucket, in the order in which they run."""
    legs = transport.legs
    scatters: dict[str, ReduceScatter] = {}
    for number, leg in enumerate(legs):
        comm = mesh[leg.group]
        memory = lane.leg(number, leg, comm)
        feed: Feed = FromGradients(bucket, transport.source, current)
        if number > 0:
            feed = FromSums(lane.sums(number, leg), current)
        sink: Sink = IntoShard(bucket, current)
        if number + 1 < len(legs):
            sink = IntoSums(lane.sums(number + 1, legs[number + 1]))
        scatters[leg.group] = ReduceScatter(comm, leg, memory, feed, sink, current)
        leg.encoder.bind(memory.turns[0].buffers)
    gathers = [
        gather_sums(mesh[leg.group], leg, scatters[leg.group], current)
        for hop in bucket.spec.reduce_hops
        for leg in legs
        if hop.op == "all_gather" and hop.group == leg.group
    ]
    return [*scatters.values(), *gathers]
