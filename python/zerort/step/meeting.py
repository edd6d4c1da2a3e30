"""Windows that the caller ends, where every backward is reduced: ranks may come to the end of one
after other numbers of backwards.

Before each pass and before the vote each rank says which of them comes next: one all-reduce of a
number. A rank that is at the vote while another is at a pass takes part in it with nothing. So
ranks may differ, as they may where gradients are reduced once at the end. Where windows end by
count there are no meetings: equally many backwards are the rule, and a failure is the standby's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from zerort.mesh import Control

__all__ = ["Meeting"]


class Meeting:
    """One engine's meetings."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def before_pass(self) -> None:
        """A pass is about to begin here."""
        self._passes_elsewhere(1)

    def before_vote(self, take_part: Callable[[], None]) -> None:
        """Returns when all ranks are about to vote; `take_part` in a pass of those that are not."""
        while self._passes_elsewhere(0):
            take_part()

    def _passes_elsewhere(self, mine: int) -> int:
        count = torch.tensor([mine])
        self._control.all_reduce(count)
        return int(count.item())
