"""What a rank computes in a step, whatever it was learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from zerort import _core
from zerort.step.overlap import Wish

__all__ = ["BYTES", "FORMATS", "Dtype", "Subject", "evenly"]

Dtype: TypeAlias = Literal["f32", "f16", "bf16", "f64"]

BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8}

FORMATS: tuple[Dtype, ...] = ("f32", "bf16", "f16", "f64")
"""Dtypes by the number of the wire format that sends them as they are."""

Spec: TypeAlias = tuple[int, Dtype, int, int]


@dataclass(frozen=True)
class Subject:
    """Parameters in registration order, and what computing with them takes, in ns."""

    name: str
    numels: Sequence[int]
    dtypes: Sequence[Dtype]
    arrivals: Sequence[int]
    """When each gradient comes, behind the start of a backward."""
    forward_ns: int
    backward_ns: int
    micro_batches: int = 1
    other_ns: int = 0
    update_element_ns: float = 0.0
    sum_byte_ns: float = 0.0
    blocks: bool = False
    """Waiting blocks the host, as on a CPU."""
    stage: int = 2
    """That is predicted where none is asked for."""
    publish: Wish = "auto"
    """Likewise, who waits for updated parameters."""
    measured: tuple[int, float] | None = None
    """Ranks and ms of the step that was recorded."""
    notes: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Of all parameters."""
        return sum(self.numels)

    @property
    def nbytes(self) -> int:
        """Of all gradients, as they lie in memory."""
        return sum(n * BYTES[dtype] for n, dtype in zip(self.numels, self.dtypes, strict=True))

    @property
    def item(self) -> int:
        """Bytes of its smallest element."""
        return min(BYTES[dtype] for dtype in self.dtypes)

    def workload(self) -> _core.Workload:
        """As the core has it."""
        return _core.Workload(
            self.forward_ns,
            self.backward_ns,
            self.arrivals,
            micro_batches=self.micro_batches,
            other_ns=self.other_ns,
        )

    def specs(self, wire: int | None) -> list[Spec]:
        """For planning; `wire` is a format's number, None each dtype's own."""
        return [
            (numel, dtype, 0, FORMATS.index(dtype) if wire is None else wire)
            for numel, dtype in zip(self.numels, self.dtypes, strict=True)
        ]

    def units(self, cap: int) -> list[int]:
        """Runs of parameters of up to `cap` elements, one that is longer by itself."""
        starts, fill, unit = [], 0, -1
        for numel in self.numels:
            if unit < 0 or fill + numel > cap:
                unit, fill = unit + 1, 0
            fill += numel
            starts.append(unit)
        return starts

    def largest(self, units: Sequence[int]) -> int:
        """Elements of the longest unit."""
        totals = [0] * (max(units, default=0) + 1)
        for unit, numel in zip(units, self.numels, strict=True):
            totals[unit] += numel
        return max(totals)


def evenly(numels: Sequence[int], backward_ns: int) -> list[int]:
    """Arrivals in reverse order of registration, each behind what its parameter's share takes."""
    total = max(1, sum(numels))
    done = accumulate(reversed(numels))
    return [backward_ns * part // total for part in done][::-1]
