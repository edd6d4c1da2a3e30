"""Ranks whose data ends at different steps: one that is out of data completes its peers' steps on
zeros until all are.

Within `join` ranks meet in a *roll* before every pass and every vote: one small all-reduce in which
each says what comes next on it. A rank that is out of data says so and does what the others are
about to do. So no collective pairs with a wrong one, and one that leaves by an exception is heard
at the next roll. Outside `join` there are no rolls.

It decides nothing about gradients: what the ranks have given is counted here, and the boundary
divides by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch

from zerort.errors import StepError
from zerort.mesh import Comm
from zerort.step.accumulation import Accumulation, Window

__all__ = ["Join", "JoinEnded", "Next", "Row", "Served", "read"]


class Next(IntEnum):
    """What comes next on a rank."""

    PASS = 1
    """A backward's gradients are about to be reduced."""
    VOTE = 2
    """The end of an accumulation window."""
    DONE = 3
    """It has no data left, and does as the others do."""
    FAILED = 4
    """An exception has left the context."""


class JoinEnded(StepError):
    """Raised on all ranks alike, at one roll: no rank takes part in a further one."""


@dataclass(frozen=True)
class Row:
    """What one rank brings to a roll."""

    next: Next
    given: int
    """Micro-batches of this window with a gradient."""
    taken: int
    """Micro-batches of this window that are over, the one at its end included."""
    divisor: float
    """What its window's gradients are still to be divided by; 0 where it has none."""


class Served(Protocol):
    """What a rank that is out of data does for the others."""

    @property
    def accumulation(self) -> Accumulation:
        """Where in the window this rank stands."""

    def roll(self, coming: Next) -> None:
        """Meets the other ranks."""

    def reduce_nothing(self) -> None:
        """Takes part in a pass."""

    def end_step(self) -> None:
        """Takes part in a step."""


class Join:
    """One `engine.join()` under way."""

    def __init__(self, comm: Comm, *, by_initial_world: bool, throws: bool) -> None:
        self.by_initial_world = by_initial_world
        self.rows: Sequence[Row] = ()
        """The last roll's, by rank."""
        self._comm = comm
        self._throws = throws
        self._over: str | None = None

    @property
    def given(self) -> int:
        """Micro-batches with a gradient that all ranks have brought to this window."""
        return sum(row.given for row in self.rows)

    @property
    def taken(self) -> int:
        """How many micro-batches the longest window has."""
        return max(row.taken for row in self.rows)

    @property
    def divisor(self) -> float | None:
        """What the window's gradients are still to be divided by, on the ranks that have some."""
        return max((row.divisor for row in self.rows), default=0.0) or None

    def correction(self, steps: int) -> float:
        """What turns a division by `steps` on every rank into one by those given."""
        if self.by_initial_world:
            return 1.0
        # a rank that has failed may have been the only one to give: that step is not applied
        return len(self.rows) * steps / max(1, self.given)

    def serve(self, served: Served) -> None:
        """Out of data: does on zeros what the others do, until no rank has data left."""
        accumulation = served.accumulation
        while True:
            served.roll(Next.DONE)
            accumulation.window.divisor = accumulation.window.divisor or self.divisor
            coming = {row.next for row in self.rows}
            # once all are done, what their last windows hold is still a step
            if Next.PASS in coming or (coming == {Next.DONE} and not accumulation.every):
                served.reduce_nothing()
            if Next.PASS in coming:
                continue
            if coming == {Next.DONE} and not self.given:
                break
            try:
                served.end_step()
            finally:
                accumulation.end_window(self.taken)
        accumulation.end_window(self.taken)

    def roll(self, coming: Next, window: Window, reason: str | None = None) -> None:
        """Tells what comes next here and hears what comes elsewhere.

        Raises `JoinEnded` on all ranks when some rank has failed (with `reason`), when what comes
        next differs, or when one has ended early and that is not allowed.
        """
        if self._over is not None:
            raise JoinEnded(self._over)
        taken = window.taken + (coming is Next.VOTE)
        row = Row(coming, window.given, taken, window.divisor or 0.0)
        rows = torch.zeros(self._comm.world, 4, dtype=torch.float64)
        rows[self._comm.rank] = torch.tensor(
            [row.next, row.given, row.taken, row.divisor], dtype=torch.float64
        )
        self._comm.control.all_reduce(rows)
        self.rows = [
            Row(Next(int(each[0])), int(each[1]), int(each[2]), each[3]) for each in rows.tolist()
        ]
        found = read(self.rows, throws=self._throws)
        if any(each.next is Next.FAILED for each in self.rows):
            reasons = self._comm.control.gather_objects(reason)
            found = "; ".join(
                f"rank {rank}: {each}" for rank, each in enumerate(reasons) if each is not None
            )
            found = f"join() has ended on all ranks, because an exception left it. {found}"
        if found is not None:
            self._over = found
            raise JoinEnded(found)


def read(rows: Sequence[Row], *, throws: bool) -> str | None:
    """Why the ranks cannot go on together, or None where they can."""
    done = [rank for rank, row in enumerate(rows) if row.next is Next.DONE]
    if throws and 0 < len(done) < len(rows):
        return (
            f"rank {done[0]} is out of data before the others, and "
            "join(throw_on_early_termination=True) makes that an error; no rank goes on"
        )
    coming = {row.next: rank for rank, row in enumerate(rows)}
    if Next.PASS in coming and Next.VOTE in coming:
        return (
            f"rank {coming[Next.PASS]} begins a backward and rank {coming[Next.VOTE]} is at its "
            "step: within join() every micro-batch has equally many backwards on all ranks"
        )
    return None
