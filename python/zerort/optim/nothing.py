"""Where there is no optimizer: what an engine that only runs forward has in its place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from zerort.memory import Stepped
from zerort.optim.segments import Segment

__all__ = ["ALL_FROZEN", "NONE_GIVEN", "NoOptimizer"]

NONE_GIVEN = (
    "it has no optimizer: give zerort.initialize one, as optimizer=... or by the key optimizer "
    "{type, params}"
)
ALL_FROZEN = (
    "none of its parameters required grad at zerort.initialize: let one require grad there, and "
    "freeze and unfreeze afterwards"
)


class NoOptimizer:
    """Owns no segment, so that nothing is updated, saved or loaded; `reason` says why there is no
    optimizer, and the way out.
    """

    optimizer: Any = None
    name: str | None = None
    groups: Sequence[dict[str, Any]] = ()
    kinds: Sequence[str] = ()
    segments: Sequence[Segment] = ()

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def split(self) -> None:
        """There is nothing to cut."""

    def check(self) -> None:
        """There is nothing to exchange."""

    def restart(self, label: Callable[[int], Hashable]) -> None:
        """There is no state."""

    def settle_rates(self) -> None:
        """There is no rate."""

    def batches(self, order: Sequence[int] = ()) -> Sequence[Sequence[Stepped]]:
        """No bucket is trained."""
        return ()

    def step(self, factor: float, batch: Sequence[Stepped]) -> None:
        """There is nothing to update."""
