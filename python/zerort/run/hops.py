"""The collectives of a bucket, and the arithmetic around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from zerort.memory import FlatBucket, HeldBucket
from zerort.mesh import Comm, Work
from zerort.run import nonfinite
from zerort.run.flight import Hop, Transport
from zerort.wire import Buffers

__all__ = ["PUBLISH", "REDUCE", "Fold", "GatherSums", "GatherValues", "Pass", "ReduceScatter"]


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


@dataclass(frozen=True)
class OfGradient:
    """A hop of a bucket's gradient, with all that it needs."""

    comm: Comm
    """Of the hop's group."""
    bucket: FlatBucket
    transport: Transport
    buffers: Buffers
    current: Pass


class ReduceScatter(OfGradient):
    """From gradients to the sum of this rank's shard, in the accumulator."""

    name = "reduce_scatter"

    @property
    def buffer(self) -> Tensor:
        """The gradient of the whole bucket, encoded."""
        return self.buffers.send.tensor

    def make(self) -> Work:
        """Packs the gradients."""
        if self.current.failure is None:
            absent = self.transport.source.pack(self.transport.encoder)
            names, params = self.bucket.names, self.bucket.params
            self.current.absent += [names[i] for i in absent if params[i].requires_grad]
        else:
            self.transport.encoder.clear()
        return self.comm.reduce_scatter(self.buffers.recv.tensor, self.buffers.send.tensor)

    def take(self) -> None:
        """Sums what arrived."""
        bucket, fold = self.bucket, self.current.fold
        into = bucket.sums.open(add=fold.add)
        bucket.squares = self.transport.encoder.decode(into, scale=fold.scale, add=fold.add)
        bucket.sums.close()
        if (
            isinstance(bucket.squares, float)
            and not math.isfinite(bucket.squares)
            and self.current.nonfinite is None
        ):
            self.current.nonfinite = self._culprit()

    def _culprit(self) -> tuple[int, int] | None:
        wire, encoder = self.transport.wire, self.transport.encoder
        pieces = self.comm.pieces(adds=wire.adds)
        return nonfinite.in_arrival(self.bucket, encoder, pieces, self.comm.rank)


class GatherSums(OfGradient):
    """From each rank's sums to all of them on every rank, where each has the whole optimizer."""

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """Where all ranks' sums come together."""
        rounds = self.transport.encoder.rounds
        return self.buffers.send.tensor if rounds else self.bucket.accum.tensor

    def make(self) -> Work:
        """Rounds the sum to what is sent."""
        if self.transport.encoder.rounds:
            # What every rank will step with is the rounded sum, so the norm is that one's.
            self.bucket.squares = self.transport.encoder.round(self.bucket.reduced_shard)
        return self.comm.all_gather(self.buffer)

    def take(self) -> None:
        """Widens the sums where they were rounded."""
        if self.transport.encoder.rounds:
            self.transport.encoder.spread(self.bucket.accum)


@dataclass(frozen=True)
class GatherValues:
    """From each rank's part of the parameters to all of them on every rank."""

    comm: Comm
    bucket: HeldBucket

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """The parameters themselves, or the memory that is to be theirs."""
        return self.bucket.values.landing

    def make(self) -> Work:
        """Nothing to write: this rank's part is in its place."""
        return self.comm.all_gather(self.buffer)

    def take(self) -> None:
        """Nothing to read: parameters are views of what has come."""
        self.bucket.values.land()


REDUCE: dict[str, Callable[[Comm, FlatBucket, Transport, Buffers, Pass], Hop]] = {
    "reduce_scatter": ReduceScatter,
    "all_gather": GatherSums,
}
PUBLISH: dict[str, Callable[[Comm, FlatBucket], Hop]] = {"all_gather": GatherValues}
"""What makes the hops that the core plans, by their `op`."""
