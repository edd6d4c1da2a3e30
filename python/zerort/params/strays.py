"""Passes that need something else every time: said once of each kind."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

__all__ = ["Strays"]

_log = logging.getLogger("zerort")


class Strays:
    """Of rank `rank`."""

    def __init__(self, rank: int) -> None:
        self.names: Sequence[str] = ()
        """Of the modules, by their number."""
        self._rank = rank
        self._said: set[tuple[str, int]] = set()

    def say(self, passes: Iterable[tuple[str, int]]) -> None:
        """`passes` of these kinds, which begin at these modules, follow no list."""
        for kind, entry in passes:
            if (kind, entry) in self._said:
                continue
            self._said.add((kind, entry))
            _log.info(
                "rank %d: the %s of %s needs its parameters in another order every time, so they "
                "are asked for one by one",
                self._rank,
                kind.replace("_", " "),
                self.names[entry] if entry < len(self.names) else "the model",
            )
