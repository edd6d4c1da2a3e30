"""Which ranks have come to a start: before groups are made, each leaves a word in the job's store.

Making a group waits for all ranks, and where one does not come says no more than that it waited.
What it guarantees: where the store answers, ranks that have not come are found. What it does not
do: it finds none that came and has ended since, nor, in a store that outlives a restart of the job,
one that came to the same start before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import count

from zerort.mesh.board import Board, Unanswered

__all__ = ["Roster"]

_SECONDS = 2.0
"""That a store may take for an answer."""

_starts = count()
"""All ranks start as often as the others, in one order."""


class Roster:
    """Of one start of a job of `world` ranks."""

    def __init__(self, board: Board | None, world: int) -> None:
        self._board = board
        start = next(_starts)
        self._keys = [f"zerort/start/{start}/{rank}" for rank in range(world)]

    def sign(self, rank: int) -> None:
        """This rank has come."""
        if self._board is not None:
            with suppress(Unanswered):
                self._board.leave(self._keys[rank], "here", _SECONDS)

    def missing(self) -> Sequence[int]:
        """Ranks that have not; none where that is not known."""
        if self._board is None:
            return ()
        with suppress(Unanswered):
            came = self._board.find(self._keys, _SECONDS)
            return [rank for rank, key in enumerate(self._keys) if key not in came]
        return ()
