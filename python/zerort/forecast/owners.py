"""Who updates parameters that are not cut: what each rank has of them, and what it does for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zerort import _core
from zerort.memory import DTYPES, Asked, Dtypes

__all__ = ["Exchanged", "Owners", "unevenness"]


@dataclass(frozen=True)
class Owners:
    """Of all parameters that are whole, by rank."""

    owned: int
    """Buckets whose shards hold whole parameters."""
    exchanged: int
    """Buckets whose shards cut them, so that ranks exchange the parts."""
    numel: int
    padded: int
    """Elements of these buckets, with their padding."""
    elements: Sequence[int]
    costs: Sequence[int]
    """Of one update: floating-point operations where an optimizer's are known, else elements."""

    @classmethod
    def of(cls, plan: _core.Plan) -> Owners | None:
        """None where there are none, or every rank updates all."""
        buckets = [bucket for bucket in plan.buckets if bucket.way is not None]
        if not buckets:
            return None
        elements = [0] * plan.world
        for bucket in buckets:
            for param, numel in zip(bucket.params, bucket.numels, strict=True):
                owner = plan.owner(param)
                assert owner is not None
                elements[owner] += numel
        ways = [bucket.way for bucket in buckets]
        padded = sum(bucket.numel for bucket in buckets)
        return cls(
            ways.count("owned"),
            ways.count("exchanged"),
            sum(elements),
            padded,
            elements,
            plan.costs,
        )

    @property
    def ranks(self) -> int:
        """Those that own anything."""
        return sum(map(bool, self.elements))

    @property
    def padding(self) -> float:
        """As a share of what is padded."""
        return self.padded / self.numel - 1 if self.numel else 0.0


@dataclass(frozen=True)
class Exchanged:
    """Bytes that each rank sends where parameters are exchanged, at a boundary."""

    there: Sequence[int]
    """Of gradients, to the owners of what they are of."""
    back: Sequence[int]
    """Of parameters that it has updated."""

    @classmethod
    def of(cls, plan: _core.Plan, asked: Asked) -> Exchanged:
        """Nothing where none is."""
        there, back = [0] * plan.world, [0] * plan.world
        ranks = range(plan.world) if any(b.way == "exchanged" for b in plan.buckets) else ()
        for rank in ranks:
            for exchange in plan.exchanges(rank):
                values = _DTYPES[exchange.dtype]
                there[rank] += sum(exchange.send_splits) * Dtypes.of(values, asked).sums.itemsize
                back[rank] += sum(exchange.recv_splits) * values.itemsize
        return cls(there, back)


_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def unevenness(by_rank: Iterable[int]) -> float:
    """The most over the mean."""
    values = list(by_rank)
    return max(values) * len(values) / sum(values) if any(values) else 1.0
