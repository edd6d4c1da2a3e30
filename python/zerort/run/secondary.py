"""Gathers inside hosts alone: of units whose values this rank's host has had since they were last
replaced.

A gather from all ranks keeps what the hop between hosts has brought (`memory.Secondary`). The next
ones of the unit put that in its place and make the hop inside the host, until the unit is
*forgotten*, and what is under way then is not kept either.

What it guarantees: all ranks choose alike. They start the same gathers in one order, and forget
units in the same places of it: where a roll call has told that a rank has replaced values, and
before a gather that ranks have asked for, which any of them may have done meanwhile. What is
written into a shard past the engine and past torch is seen behind the next step.

What it does not do: it copies nothing, and holds no roll call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from zerort.memory import HeldBucket, Secondary
from zerort.mesh import GatherMemory, Work
from zerort.run.flight import Hop

__all__ = ["Near", "Replaced", "Ways"]


class Ways:
    """How one unit's buckets are gathered: through the hops of `far`, or where `secondaries` keep
    what the first of them brings, from there.

    `own` is a communicator's memory for gathers of one rank.
    """

    def __init__(
        self,
        far: Sequence[Sequence[Hop]],
        secondaries: Sequence[Secondary] = (),
        own: GatherMemory | None = None,
    ) -> None:
        self._far, self._near = far, far
        self._secondaries = secondaries
        self._kept: Near | None = None
        if secondaries and own is not None:
            kept = self._kept = Near(len(secondaries))
            pairs = [*enumerate(zip(far, secondaries, strict=True))]
            self._far = [[_Kept(h[0], s, kept, n), *h[1:]] for n, (h, s) in pairs]
            self._near = [[_Restored(s, own), *h[1:]] for _, (h, s) in pairs]

    def choose(self) -> Sequence[Sequence[Hop]]:
        """By bucket, for a gather that begins. The one before has landed."""
        if self._kept is None:
            return self._far
        return self._near if self._kept.begin() else self._far

    def forget(self) -> None:
        """What is kept, or is under way, is not to be gathered from."""
        if self._kept is not None:
            self._kept.forget()

    def close(self) -> None:
        """Nothing is gathered any more."""
        for secondary in self._secondaries:
            secondary.release()
        self._far = self._near = ()
        self._kept = None


class Near:
    """Whether all buckets of a unit are kept as they are: by number, since when each is."""

    def __init__(self, buckets: int) -> None:
        self._time = self._begun = 0
        self._since = [-1] * buckets

    def begin(self) -> bool:
        """A gather begins; returns whether it is to be made from what is kept."""
        self._begun = self._time
        return all(since == self._time for since in self._since)

    def note(self, bucket: int) -> None:
        """What the gather under way has brought of a bucket is kept."""
        self._since[bucket] = self._begun

    def forget(self) -> None:
        """Values have been replaced."""
        self._time += 1


@dataclass(frozen=True)
class _Kept:
    """A hop between hosts, of which a copy is taken."""

    hop: Hop
    secondary: Secondary
    kept: Near
    bucket: int

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """The hop's."""
        return self.hop.buffer

    def make(self) -> Work:
        """The hop's."""
        return self.hop.make()

    def take(self) -> None:
        """Before the next hop: what has come is whole."""
        self.hop.take()
        self.secondary.keep()
        self.kept.note(self.bucket)


@dataclass(frozen=True)
class _Restored:
    """In its place: the copy. It moves nothing between ranks."""

    secondary: Secondary
    own: GatherMemory

    name = "all_gather"

    @property
    def buffer(self) -> Tensor:
        """Nothing is sent."""
        return self.secondary.nothing

    def make(self) -> Work:
        """Writes it to where the next hop finds it."""
        self.secondary.restore()
        return self.own.make(self.buffer, lost=False)

    def take(self) -> None:
        """Nothing more."""


class Replaced:
    """Whether this rank has replaced what it keeps of `buckets`, since a roll call that all ranks
    have read alike.
    """

    def __init__(self, buckets: Iterable[HeldBucket]) -> None:
        self._buckets = [*buckets]
        self._read = self._told = self._now()

    def tell(self) -> bool:
        """For this rank's row of a roll call."""
        self._told = self._now()
        return self._told != self._read

    def heard(self) -> None:
        """The roll call has been read by all ranks."""
        self._read = self._told

    def _now(self) -> list[int]:
        return [bucket.revision for bucket in self._buckets]
