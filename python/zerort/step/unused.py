"""Parameters that a backward did not reach on this rank: each is named once, or is an error where
that is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from zerort.errors import StepError

__all__ = ["Absent"]

_log = logging.getLogger("zerort")

_MOST = 8
"""Names in one message."""


class Absent:
    """Remembers what has been named."""

    def __init__(self, rank: int, policy: Literal["zero", "raise"]) -> None:
        self._rank = rank
        self._policy = policy
        self._named: set[str] = set()

    def tell(self, names: Sequence[str]) -> None:
        """Logs the new ones among `names`, or raises `StepError` where that is the policy."""
        new = [name for name in names if name not in self._named]
        if not new:
            return
        told = (
            f"{', '.join(new[:_MOST])}{f' and {len(new) - _MOST} more' if len(new) > _MOST else ''}"
        )
        if self._policy == "raise":
            raise StepError(
                f"no gradient came for {told}: the forward did not use them. Use or freeze them, "
                'or let them count as zero with "zerort": {"unused_parameters": "zero"}'
            )
        self._named.update(new)
        _log.warning(
            "rank %d: no gradient came for %s; it counts as zero (said once per parameter)",
            self._rank,
            told,
        )
