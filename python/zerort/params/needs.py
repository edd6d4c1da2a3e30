"""Needs: sets of units that are read together, and how they become whole.

What this guarantees: `need` returns only when the values of a set are there; what has no hook to
tell of it is brought at the beginning of every backward. What it does not do: it opens no pass, and
it decides no order, which is the core's (`rust/core/src/gatherer.rs`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zerort import _core
from zerort.memory import undisturbed
from zerort.params.roll import RollCall
from zerort.run.executor import Executor

__all__ = ["Needs"]


class Needs:
    """Of one rank's passes; `rolls` asks for what no list brings."""

    def __init__(self, gatherer: _core.Gatherer, executor: Executor, rolls: RollCall) -> None:
        self.at = -1
        """Number of the node that a backward has come to, where torch does not tell; -1 where
        no hook does.
        """
        self._gatherer = gatherer
        self._executor = executor
        self._rolls = rolls
        self._sets: dict[int, tuple[int, ...]] = {}
        self._unhooked: list[int] = []

    def set_of(self, units: Sequence[int]) -> int:
        """The number of a set of units that are needed together."""
        number = self._gatherer.set_of(units)
        self._sets[number] = tuple(sorted(set(units)))
        return number

    @undisturbed
    def need(self, number: int) -> None:
        """Returns when the units of the set are whole."""
        running = torch._C._current_autograd_node()
        node = self.at if running is None else running._sequence_nr()
        answer = self._gatherer.need(number, node)
        while answer is not None:
            actions, unit = answer
            self._executor.enqueue(actions)
            self._executor.reach()
            if unit is not None:
                self._rolls.answered()
                answer = self._gatherer.need(number, node)
                continue
            self._executor.land(self._sets[number])
            self._gatherer.arrived(number)
            return

    def acquire(self, units: int) -> None:
        """Brings the units of a set; a use of them begins."""
        acquire = self._gatherer.acquire
        number = torch._C._autograd._get_sequence_nr() if torch.is_grad_enabled() else -1
        if not acquire(units, number):
            self.need(units)
            acquire(units, number)

    def holds(self, number: int) -> None:
        """No hook will tell when the backward needs the set: it is brought at its beginning."""
        if number not in self._unhooked:
            self._unhooked.append(number)

    @undisturbed
    def bring(self) -> None:
        """A backward begins."""
        for number in self._unhooked:
            self.need(number)
            self._gatherer.acquire(number)
