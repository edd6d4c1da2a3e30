"""From a parameter to what its engine holds of it: masters, gradients and optimizer state, in
shards.

What it guarantees: a parameter is found as long as its engine lives, and no longer; all ranks take
part in a call or raise together. What it does not do: it computes nothing, and it knows no dtype
but those that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from zerort.errors import StepError
from zerort.memory import FlatBucket, Form, Kept, Room, Stepped, unintercepted
from zerort.mesh import Consensus
from zerort.optim.segments import Segment
from zerort.params.roll import UTILITY
from zerort.step.readings import Components
from zerort.step.transaction import Transaction

__all__ = ["Held", "Owner", "Place", "held"]

T = TypeVar("T")

_owners: dict[int, Owner] = {}
"""By the parameter's id."""


B = TypeVar("B", bound=Kept)


@dataclass(frozen=True)
class Place(Generic[B]):
    """Where a parameter lies among all ranks' parts of a bucket, or among its rooms: so many
    elements from `start` on.
    """

    bucket: B
    form: Form
    start: int
    numel: int

    @classmethod
    def of(cls, bucket: B, param: int) -> Place[B]:
        """Of the parameter of that id."""
        spec = bucket.spec
        index = spec.params.index(param)
        return cls(bucket, bucket.forms[index], spec.offsets[index], spec.numels[index])

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Which elements of the bucket are the parameter's, of those from `lo` to `hi`."""
        return max(self.start, lo), max(self.start, lo, min(self.start + self.numel, hi))

    @property
    def own(self) -> tuple[int, int]:
        """Which elements of the bucket's owned part are the parameter's: from, to."""
        bucket = self.bucket
        lo, hi = self.span(bucket.start, bucket.start + bucket.length)
        return lo - bucket.start, hi - bucket.start

    def fragment(self, owned: Tensor) -> Tensor:
        """The parameter's elements of a tensor that lies as the bucket's owned part does."""
        lo, hi = self.own
        return owned.narrow(0, min(lo, owned.numel()), hi - lo)

    def cut(self, value: Tensor) -> Tensor:
        """This rank's fragment of a whole value, in the order in which elements lie in memory."""
        lo, hi = self.own
        flat = torch.empty(self.numel, dtype=value.dtype, device=value.device)
        self.form.over(flat).copy_(value.reshape(self.form.shape))
        at = lo + self.bucket.start - self.start
        return flat.narrow(0, min(max(at, 0), self.numel), hi - lo)


@dataclass(frozen=True)
class Held:
    """One parameter in its engine's memory: at `position` in its bucket."""

    owner: Owner
    parameter: nn.Parameter
    name: str
    position: int
    summed: Place[FlatBucket]
    """Where its gradient and its values are."""
    kept: Place[Stepped]
    """Where its master is, and the optimizer's state of it."""

    @property
    def bucket(self) -> FlatBucket:
        """Its own."""
        return self.summed.bucket

    @property
    def form(self) -> Form:
        """How its elements lie."""
        return self.summed.form

    @property
    def numel(self) -> int:
        """Of all of it."""
        return self.summed.numel

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.bucket.owned.tensor.dtype

    def whole(self, place: Place[Any], fragment: Tensor) -> Tensor:
        """The parameter put together of all ranks' fragments, in its shape. All ranks call it."""
        comm, bucket = self.owner.comm, place.bucket
        if not self.owner.is_sharded or not self.numel:
            return self.form.over(fragment.clone())
        shard = bucket.spec.shard_numel
        spans = [place.span(rank * shard, (rank + 1) * shard) for rank in range(comm.world)]
        most = max(hi - lo for lo, hi in spans)
        # what is at home on the host comes together where collectives run
        parts = torch.zeros(comm.world * most, dtype=fragment.dtype, device=comm.device)
        parts.narrow(0, comm.rank * most, fragment.numel()).copy_(fragment)
        comm.all_gather(parts).start().wait()
        pieces = [parts.narrow(0, r * most, hi - lo) for r, (lo, hi) in enumerate(spans)]
        return self.form.over(torch.cat(pieces))

    def take_writes(self) -> None:
        """A master on this rank follows what has been written into the parameter. Where that is
        exchanged, calls that all ranks make together do so.
        """
        if self.kept.bucket is self.summed.bucket:
            self.summed.bucket.take_writes()

    @property
    def requires_grad(self) -> bool:
        """Whether it trains."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.parameter.requires_grad

    @property
    def local_gradient(self) -> Tensor | None:
        """A copy of what waits on this rank to be reduced."""
        return self.owner.reduction.local.gradient(self.bucket.spec.id, self.position)

    def write_local_gradient(self, value: Tensor) -> None:
        """Replaces what waits on this rank. Raises `StepError` where nothing does."""
        if self.local_gradient is None:
            raise StepError(
                f"parameter {self.name} has no gradient on this rank: there is one between "
                "backward and step"
            )
        value = value.reshape(self.form.shape)
        self.owner.reduction.local.replace(self.bucket.spec.id, self.position, value)

    def replace(self, value: Tensor) -> None:
        """Writes a whole `value`, which follows from the master, into this rank's part, and where
        the parameter is whole on this rank.
        """
        kept = self.kept.bucket
        if isinstance(kept, Room):
            kept.sent(*self.kept.own)
            self.bucket.arrive(self.summed.own[0], self.summed.cut(value))
        values, start = self.bucket.values, self.summed.start
        if values.is_whole:
            self.form.over(values.tensor.narrow(0, start, self.numel)).copy_(value)
            torch.autograd.graph.increment_version([self.parameter])

    def segments(self) -> Iterator[tuple[Segment, int, int]]:
        """Where the optimizer keeps its state of this rank's fragment: segments, and from where to
        where of the bucket's owned part.
        """
        lo, hi = self.kept.own
        for segment in self.owner.optimizer.segments:
            first, last = max(lo, segment.start), min(hi, segment.start + segment.length)
            if segment.bucket is self.kept.bucket and first < last:
                yield segment, first, last


class Owner:
    """An engine, as far as `zerort.utils` needs it, until `close`."""

    def __init__(self, transaction: Transaction, parts: Components) -> None:
        self.comm = parts.mesh.shard
        self.optimizer = parts.boundary.optimizer
        self.is_sharded = parts.reduction.plan.shards_optimizer
        self.reduction = parts.reduction
        self._exchange = parts.boundary.exchange
        self._flat = parts.boundary.flat
        self._transaction = transaction
        self._consensus = Consensus(parts.mesh.control, StepError)
        self._params = [id(p) for bucket in self._flat.trained for p in bucket.params]
        _owners.update(dict.fromkeys(self._params, self))

    def close(self) -> None:
        """Its parameters are no engine's any more."""
        for key in self._params:
            if _owners.get(key) is self:
                del _owners[key]

    def of(self, parameter: nn.Parameter) -> Held:
        """What is held of one of its parameters."""
        self._transaction.refuse_away("a function of zerort.utils")
        bucket, index = self._flat.place_of(parameter)
        param = bucket.spec.params[index]
        kept: Stepped = self._flat.rooms.get(bucket.spec.id, bucket)
        return Held(
            self,
            parameter,
            bucket.names[index],
            index,
            Place.of(bucket, param),
            Place.of(kept, param),
        )

    @property
    def has_sums(self) -> bool:
        """Whether the accumulators hold reduced gradients of the window under way."""
        return self.reduction.passes > 0

    def together(self, call: str, name: str, attempt: Callable[[], T]) -> list[T]:
        """What `attempt` gave on each rank. Nothing is under way any more, and sums are complete.

        Raises `StepError` on all ranks where it raised on one, or where they do not all make this
        call with this parameter.
        """
        self._transaction.pause(UTILITY)
        self._exchange.take_writes()
        found: list[tuple[str, Any]] = self._consensus.gather(
            f"{call} failed", lambda: (f"{call} with {name}", attempt())
        )
        calls = [made for made, _ in found]
        if len(set(calls)) > 1:
            listed = "; ".join(f"rank {rank} calls {made}" for rank, made in enumerate(calls))
            raise StepError(
                f"a function of zerort.utils is called by all ranks together, with the same "
                f"parameter: {listed}"
            )
        return [value for _, value in found]

    def alike(self, call: str, attempt: Callable[[], object]) -> None:
        """Runs `attempt` on all ranks; raises `StepError` on all where it raised on one."""
        self._consensus.agree(f"{call} failed", attempt)


@unintercepted
def held(parameter: Any) -> Held | None:
    """What an engine holds of a parameter; None for one that no engine has planned."""
    owner = _owners.get(id(parameter))
    return None if owner is None else owner.of(parameter)
