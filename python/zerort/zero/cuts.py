"""How the ranks have cut a parameter among them.

A parameter that is sharded since its birth is cut into equal parts. One whose engine is gone is cut
as its bucket was: a rank has what lay in its shard, which may be nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from zerort.memory import Alone
from zerort.mesh import Comm
from zerort.zero.legacy import Legacy

__all__ = ["AsInBucket", "Cut", "Even"]


class Cut(Protocol):
    """Of one parameter, whose elements are counted in the order in which they lie in memory."""

    @property
    def comm(self) -> Comm:
        """The ranks that have it."""

    extent: Alone
    """The elements, with padding behind the last where that is needed."""
    own: tuple[int, int]
    """Which of these this rank has: from, to."""
    legacy: Legacy | None
    """Of which engine, if of one."""

    def gather(self, values: Tensor) -> None:
        """Brings the others' into `values` (extent.numel,), where this rank's are. All ranks call
        it.
        """


class Even:
    """Into equal parts."""

    legacy: Legacy | None = None

    def __init__(self, comm: Comm, numel: int) -> None:
        self.comm = comm
        self.extent = Alone.of(numel, comm.world)
        each = self.extent.numel // comm.world
        self.own = comm.rank * each, (comm.rank + 1) * each

    def gather(self, values: Tensor) -> None:
        """One all-gather."""
        if values.numel():
            self.comm.all_gather(values).start().wait()


class AsInBucket:
    """`numel` elements that began at element `offset` of a bucket of which each rank had
    `shard_numel`.
    """

    def __init__(self, legacy: Legacy, offset: int, numel: int, shard_numel: int) -> None:
        self.legacy: Legacy | None = legacy
        self._legacy = legacy
        self.extent = Alone(numel, (numel,))
        borders = [shard * shard_numel - offset for shard in range(legacy.world + 1)]
        inside = [min(max(border, 0), numel) for border in borders]
        self._parts: Sequence[tuple[int, int]] = list(pairwise(inside))
        self.own = self._parts[legacy.rank]

    @property
    def comm(self) -> Comm:
        """Since the ranks have met."""
        return self._legacy.comm

    def gather(self, values: Tensor) -> None:
        """A broadcast from each rank that has something."""
        for shard, (lo, hi) in enumerate(self._parts):
            if lo < hi:
                self.comm.broadcast(values.narrow(0, lo, hi - lo), self._legacy.holders[shard])
