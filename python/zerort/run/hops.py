"""The collectives of a bucket's gradient, and the arithmetic around them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from zerort.mesh import Comm, Work
from zerort.run import nonfinite
from zerort.run.flight import Inflight

__all__ = ["Fold", "GatherSums", "Pass", "ReduceScatter"]


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
    """What broke off on this rank. From then on zeros travel and results are not taken: peers find
    a partner for each of their collectives, and the vote drops the window on all ranks.
    """


class ReduceScatter:
    """From gradients to the sum of this rank's shard, in the accumulator."""

    name = "reduce_scatter"

    def __init__(self, comm: Comm, current: Pass) -> None:
        self._comm = comm
        self._pass = current

    def make(self, flight: Inflight) -> Work:
        """Packs the gradients."""
        if self._pass.failure is None:
            self._pass.absent += flight.pack()
        else:
            flight.send.zero_()
        return self._comm.reduce_scatter(flight.recv.tensor, flight.send)

    def size(self, flight: Inflight) -> int:
        """All of the bucket, as it is encoded."""
        return flight.send.nbytes

    def take(self, flight: Inflight) -> None:
        """Sums what arrived."""
        bucket, fold = flight.bucket, self._pass.fold
        bucket.squares = flight.transport.wire.decode(
            flight.recv,
            bucket.reduced_shard,
            scale=fold.scale * flight.transport.predivide,
            add=fold.add,
        )
        if (
            isinstance(bucket.squares, float)
            and not math.isfinite(bucket.squares)
            and self._pass.nonfinite is None
        ):
            self._pass.nonfinite = nonfinite.in_arrival(bucket, flight.recv, self._comm.rank)


class GatherSums:
    """From each rank's sums to all of them on every rank, where each has the whole optimizer."""

    name = "all_gather"

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def make(self, flight: Inflight) -> Work:
        """Rounds the sum to what travels."""
        if flight.narrows:
            # What every rank will step with is the rounded sum, so the norm is that one's.
            flight.bucket.squares = flight.transport.wire.round(
                flight.bucket.reduced_shard, flight.own
            )
        return self._comm.all_gather(flight.gathered)

    def size(self, flight: Inflight) -> int:
        """All of the bucket, as it is gathered."""
        return flight.gathered.nbytes

    def take(self, flight: Inflight) -> None:
        """Widens the sums where fewer bytes travelled."""
        if flight.narrows:
            flight.bucket.accum.tensor.copy_(flight.gathered)
