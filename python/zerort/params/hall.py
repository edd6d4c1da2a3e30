"""Where ranks answer the roll calls of all their engines, if a process has several of stage 3.

Ranks may run different numbers of evaluations, so while one is in a call of one engine another may
still be in one of another's. Each would wait in its own engine's roll call. So where a process has
several engines they all hold their roll calls here, on one control group: a row says of which
engine it is, and a rank that waits in one engine's call gathers what is asked for in another's.

Where a call of one engine is made within a pass of another's that follows a list, a peer may wait
for what is still to come in that list. If all ranks make the call they come to it soon. A rank that
has waited for a moment hands out the rest of the list.

What it guarantees: each roll call of a rank pairs with one of every other rank's, whatever their
engines are, as long as all hold them here or none does, which changes in `initialize` alone, where
all ranks are. What it does not do: it keeps no engine alive, and it decides nothing.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch

from zerort.errors import PlanError
from zerort.mesh import Control, meet

__all__ = ["HALL", "Answers", "Caller", "Hall", "Place"]

GRACE = 1.0
"""Seconds in which peers that make the same call within a pass come to it."""

_MOST = 62
"""Engines at a time: each is a bit of an integer."""
_OWN = 2
"""Integers of a row that say which engine it is of, and which engines the rank has."""


class Caller(Protocol):
    """An engine's roll calls."""

    label: str
    """What people call the engine."""

    @property
    def follows(self) -> bool:
        """Whether a pass that follows a list is open here."""

    def give_way(self) -> None:
        """It does so no longer: what is left of the list has been handed out."""

    def stand_by(self, units: Sequence[int]) -> None:
        """Ranks ask for these units, while this rank is in another engine's call."""

    def parted(self) -> None:
        """Ranks have parted in other engines' calls: nothing that is under way goes on."""


class Answers(NamedTuple):
    """What the ranks have answered."""

    rows: list[list[int]]
    """By rank."""
    engines: list[int]
    """Whose row it is, by rank."""
    strangers: list[int]
    """Ranks that do not have all of these engines."""

    @property
    def words(self) -> list[int]:
        """The rows, one behind the other."""
        return [word for row in self.rows for word in row]

    @property
    def parties(self) -> list[tuple[int, list[int]]]:
        """Engines in the order of their numbers, each with its rows, one behind the other."""
        pairs = list(zip(self.engines, self.rows, strict=True))
        return [
            (engine, [word for other, row in pairs if other == engine for word in row])
            for engine in sorted(set(self.engines))
        ]


class Hall:
    """Of this process."""

    def __init__(self) -> None:
        self._callers: weakref.WeakValueDictionary[int, Caller] = weakref.WeakValueDictionary()
        self._control: Control | None = None
        self._patience = timedelta(0)
        self.deserted: str | None = None
        """Why ranks do not meet here any more, until there is another engine."""

    def prepare(self, control: Control, timeout: timedelta) -> int:
        """All ranks, before an engine is made over the ranks of `control`: returns its number, and
        opens the hall where it is not the only one. Raises `PlanError`, `CommError`.
        """
        name = "" if self._control is None else self._control.name
        views = control.gather_objects((name, list(self._callers)))
        taken = {number for _, numbers in views for number in numbers}
        number = next(number for number in range(_MOST + 1) if number not in taken)
        if number == _MOST:
            raise PlanError(
                f"this process has {_MOST} engines of stage 3: call engine.destroy() on those that "
                "are not used any more"
            )
        self.deserted = None
        if not taken or control.world == 1:
            self._close()
        elif not name or any(other != name for other, _ in views):
            self._close()
            self._control = meet(timeout)
        if self._control is not None:
            self._patience = max(self._patience, timeout)
            self._control.set_timeout(self._patience)
        return number

    def enter(self, number: int, caller: Caller) -> None:
        """The engine of this number has been made."""
        self._callers[number] = caller

    def leave(self, number: int, caller: Caller) -> None:
        """It is no more."""
        if self._callers.get(number) is caller:
            del self._callers[number]

    def control(self, own: Control) -> Control:
        """Where an engine's roll calls are held, which has `own` to itself."""
        return own if self._control is None else self._control

    def call(self, number: int, row: Sequence[int], own: Control) -> Answers:
        """Every rank's row, of whatever engine. All ranks call it, each with one."""
        control = self.control(own)
        here = sum(1 << each for each in list(self._callers))
        rows = torch.zeros(control.world, _OWN + len(row), dtype=torch.int64)
        rows[control.rank] = torch.tensor([number, here, *row], dtype=torch.int64)
        with self._giving_way(number, control):
            control.all_reduce(rows)
        answers = rows.tolist()
        engines = [each[0] for each in answers]
        needed = sum(1 << engine for engine in set(engines))
        strangers = [rank for rank, each in enumerate(answers) if needed & ~each[1]]
        return Answers([each[_OWN:] for each in answers], engines, strangers)

    @contextmanager
    def _giving_way(self, number: int, control: Control) -> Iterator[None]:
        """Within, a rank that waits for long leaves the lists of the other engines' passes."""
        others = [one for key, one in list(self._callers.items()) if key != number and one.follows]
        if not others:
            yield
            return
        deadline = time.monotonic() + GRACE

        def leave() -> None:
            while others and time.monotonic() > deadline:
                others.pop().give_way()

        control.idle = leave
        try:
            yield
        finally:
            control.idle = None

    def desert(self, cause: str) -> None:
        """A rank gives an engine back after an exception: one of several meets no rank here."""
        if self._control is not None:
            self.deserted = cause

    def stand_by(self, number: int, units: Sequence[int]) -> None:
        """Ranks ask for units of an engine of which no call is here."""
        self._callers[number].stand_by(units)

    def parted(self) -> None:
        """Ranks have parted: no engine goes on with what is under way."""
        for caller in list(self._callers.values()):
            caller.parted()

    def label(self, number: int) -> str:
        """Of an engine, for people."""
        caller = self._callers.get(number)
        return f"engine {number}" + ("" if caller is None else f" ({caller.label})")

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control, self._patience = None, timedelta(0)


HALL = Hall()
"""Of this process."""


class Place(NamedTuple):
    """An engine's place in a hall."""

    hall: Hall
    number: int
    label: str
    """What people call the engine."""
