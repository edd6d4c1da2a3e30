"""What a rank that has failed does until its peers vote: it takes part in their passes.

    culprit   fails ── vote: waits ········ empty pass ··· empty pass ···┐ counts   level
    peer      no_sync ── backward, reduced ─────── drain ──── vote ──────┘ counts   level

How many passes they go through the culprit cannot know: it left its own program. So while it waits
for the vote it starts one pass on zeros after the other, each when the one before is over. The last
of them has no partner. Once the vote has told all ranks of the failure, they compare how many
passes each has begun since the engine was made, and those with fewer run what is missing.

What it guarantees: a failure costs its peers no time-out, and all ranks go on with equally many
passes behind them. Ranks that have not failed pay nothing before a failure. What it does not do:
where parameters are sharded the roll calls do the same (`params.passes`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from zerort.grads.reduction import Reduction
from zerort.mesh import Control
from zerort.run.empty import EmptyPass

__all__ = ["Standby"]

GRACE = 0.02
"""Seconds in which peers that are on their way to the vote come to it."""
_PAUSE = 0.0005


class Standby:
    """One rank's empty passes."""

    def __init__(self, reduction: Reduction, control: Control) -> None:
        self._reduction = reduction
        self._control = control
        self._under_way: EmptyPass | None = None
        self._since = 0.0

    @contextmanager
    def attending(self, *, failed: bool) -> Iterator[None]:
        """Within, where this rank has `failed`, what waits for the peers on the control group takes
        part in their passes meanwhile.
        """
        before = self._control.idle
        if failed and before is None and self._reduction.course.waits:
            self._since = time.monotonic()
            self._control.idle = self._attend
        try:
            yield
        finally:
            self._control.idle = before

    def _attend(self) -> None:
        if self._under_way is not None:
            if not self._reduction.advance(self._under_way):
                return
            self._under_way = None
        elif time.monotonic() - self._since < GRACE:
            return
        self._under_way = self._reduction.begin_empty()

    @property
    def begun(self) -> int:
        """Passes of this rank since the engine was made."""
        return self._reduction.begun

    def level(self, begun: Sequence[int]) -> None:
        """Goes through as many passes as the rank that has `begun` the most, by rank."""
        if not self._reduction.course.waits:
            return
        while True:
            self._end()
            if self._reduction.begun >= max(begun):
                return
            self._under_way = self._reduction.begin_empty()

    def _end(self) -> None:
        """Waits for the one under way."""
        while self._under_way is not None:
            if self._reduction.advance(self._under_way):
                self._under_way = None
            else:
                time.sleep(_PAUSE)
