"""The roll call: one small all-reduce on the control group, in which each rank says what it is at.

What this guarantees: a rank that asks for a unit is answered by all before anything else happens,
so that it returns only when none asks; where ranks are at different places, all of them raise the
same error at the same roll call. Where a process has several engines, ranks may be in calls of
different ones (`params.hall`). What it does not do: it opens and closes no pass.

What the rows mean is the core's to read: `rust/core/src/roll.rs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from zerort import _core
from zerort.errors import StepError
from zerort.grads.course import Routed
from zerort.mesh import Control
from zerort.params.hall import Answers, Place
from zerort.run.executor import Executor

__all__ = ["COLLECTIVE", "FAILED", "UTILITY", "Absent", "Diverged", "Left", "RollCall", "code_of"]

UTILITY = "a function of zerort.utils"
COLLECTIVE = "a collective of its own"

_CALLS = (
    "step()",
    "save_checkpoint()",
    "load_checkpoint()",
    "save_16bit_model()",
    "join()",
    "destroy()",
    "GatheredParameters",
    UTILITY,
    COLLECTIVE,
)
"""What all ranks call together outside passes, by its number in a row."""


_REPLACED = 5
"""The place in a row's own words that says whether the rank has replaced what it keeps."""
_DESTROY = _CALLS.index("destroy()")
FAILED = 1
"""The detail of a `destroy()` while an exception is handled."""


def code_of(call: str) -> int:
    """The number of a call."""
    return _CALLS.index(call)


class Diverged(StepError):
    """Ranks are at different places of their programs. All raise it, at the same roll call."""


class Absent(Diverged):
    """Among them one that has failed, or is out of data."""


class Left(Diverged):
    """This rank gives its engine back after an exception, beside others that go on."""


class RollCall:
    """One rank's roll calls. `learn` takes what rank 0 has seen into the plan, on all ranks."""

    def __init__(
        self,
        course: Routed,
        executor: Executor,
        control: Control,
        learn: Callable[[], None],
        place: Place,
    ) -> None:
        self.abandon: Callable[[], None] = lambda: None
        """Drops all that is under way, before `Diverged` is raised."""
        self.parted: Callable[[], None] = lambda: None
        """The same, where ranks have parted in other engines' calls."""
        self.label = place.label
        self._course = course
        self._executor = executor
        self._own = control
        self._learn = learn
        self._hall, self._number = place.hall, place.number
        self._hall.enter(self._number, self)

    def leave(self) -> None:
        """The engine is no more."""
        self._hall.leave(self._number, self)

    @property
    def _control(self) -> Control:
        return self._hall.control(self._own)

    @property
    def rank(self) -> int:
        """This rank's."""
        return self._control.rank

    def decided(self, own: Sequence[int] = ()) -> _core.Reading:
        """What all ranks are at; where it is a forward, with all that has been learnt before.

        `own` are words of the caller's in this rank's row. Raises `Diverged`.
        """
        while True:
            reading = self.answered(own)
            if reading is None:
                continue
            if not (reading.news and reading.kind in ("forward", "evaluation")):
                return reading
            self.take_news()

    def answered(self, own: Sequence[int] = ()) -> _core.Reading | None:
        """Answers the others until none asks. None when this rank asked, and has been served."""
        gatherer = self._course.gatherer
        if self._hall.deserted is not None:
            self.abandon()
            raise Left(self._hall.deserted)
        while True:
            with self._executor.waits.waiting("roll call"):
                heard = self._hall.call(self._number, self._row(own), self._own)
            reading = gatherer.read(heard.words, [each != self._number for each in heard.engines])
            self._look_for_failed(reading)
            if heard.strangers:
                self._part(
                    f"rank {heard.strangers[0]} has no engine of stage 3 any more that others are "
                    f"in a call of: {self._places(reading, heard)}"
                )
            asked = gatherer.asking
            if self._serve_all(heard):
                if asked is not None:
                    return None
                continue
            match reading.what:
                case "again" | "serve":
                    continue
                case "diverged" if len(set(heard.engines)) > 1:
                    self._part(
                        f"ranks are in calls of different engines: {self._places(reading, heard)}. "
                        "Every rank has to call them in the same order; only evaluations may "
                        "differ in number"
                    )
                case "diverged":
                    self.abandon()
                    raise Diverged(_difference(reading))
                case "together":
                    self._hear_of_replaced(reading)
                    self._course.pay()
                    return reading
                case "alone":
                    return reading

    def _row(self, own: Sequence[int]) -> Sequence[int]:
        words = [*own, *[0] * (_REPLACED - len(own)), int(self._executor.units.replaced.tell())]
        return self._course.gatherer.row(words)

    def _hear_of_replaced(self, reading: _core.Reading) -> None:
        """Where a rank has replaced what it keeps, no rank gathers from what its host has had."""
        if any(own[_REPLACED] for _, _, own in reading.rows):
            self._executor.forget()
        self._executor.units.replaced.heard()

    def _look_for_failed(self, reading: _core.Reading) -> None:
        """Raises `CommError` with the reason of a rank that gives its engine back after an
        exception while others go on; on that rank `Left`.
        """
        destroying = {rank: row[2][1] for rank, row in enumerate(reading.rows) if _destroys(row)}
        failed = [rank for rank, detail in destroying.items() if detail == FAILED]
        if not failed or len(destroying) == len(reading.rows):
            return
        self.abandon()
        cause = f"rank {failed[0]} calls destroy() while it handles an exception"
        self._hall.desert(cause)
        if self.rank in destroying:
            raise Left(cause)
        raise self._control.failure("roll call", StepError(cause))

    def _serve_all(self, heard: Answers) -> bool:
        """Gathers what ranks ask for, of whatever engine, in one order; returns whether any do."""
        asked = [(engine, _core.Gatherer.asked(words)) for engine, words in heard.parties]
        for engine, units in asked:
            if units and engine == self._number:
                self._serve(units)
            elif units:
                self._hall.stand_by(engine, units)
        return any(units for _, units in asked)

    @property
    def follows(self) -> bool:
        """Whether a pass that follows a list is open here."""
        return self._course.gatherer.listed

    def give_way(self) -> None:
        """Hands out what is left of the list, which the pass does not follow any more."""
        self._executor.enqueue(self._course.gatherer.leave())
        self._executor.reach()

    def stand_by(self, units: Sequence[int]) -> None:
        """Ranks ask for units while this one is in another engine's call."""
        self.give_way()
        self._serve(units)

    def _part(self, reason: str) -> NoReturn:
        """Ranks cannot go on, whatever engines they are in: all raise it."""
        self.abandon()
        self._hall.parted()
        raise Diverged(reason)

    def _places(self, reading: _core.Reading, heard: Answers) -> str:
        return _listed(reading.rows, [f" of {self._hall.label(each)}" for each in heard.engines])

    def _serve(self, units: Sequence[int]) -> None:
        gatherer = self._course.gatherer
        # a rank may have replaced values that it has not told of yet
        self._executor.forget(units)
        self._executor.enqueue(gatherer.serve(units))
        self._executor.reach()
        self._executor.land(units)
        self._executor.enqueue(gatherer.served())

    def compare(self, reading: _core.Reading) -> None:
        """Ranks are at a call outside passes. Raises `Diverged` unless it is the same call of all,
        or a step in which the place of some is taken.
        """
        calls = {rank: _call(row) for rank, row in enumerate(reading.rows) if _calls(row)}
        absent = [rank for rank, row in enumerate(reading.rows) if not _calls(row)]
        only_steps = all(call == code_of("step()") for call, _ in calls.values())
        if len(set(calls.values())) <= 1 and (only_steps or not absent):
            return
        listed = ", ".join(f"rank {rank} calls {_CALLS[call]}" for rank, (call, _) in calls.items())
        same = not absent and len({call for call, _ in calls.values()}) == 1
        reason = f"with the same arguments: {listed}" if same else f"but {listed}"
        if absent:
            reason += f", and rank {absent[0]} has failed or is out of data"
        self.abandon()
        kind = Absent if absent else Diverged
        raise kind(f"all ranks have to make this call together, {reason}")

    def take_news(self) -> None:
        """All ranks learn what rank 0 has seen."""
        self._executor.drain()
        self._learn()


def _calls(row: tuple[str, int, list[int]]) -> bool:
    return row[0] == "boundary"


def _destroys(row: tuple[str, int, list[int]]) -> bool:
    return _calls(row) and row[2][0] == _DESTROY


def _call(row: tuple[str, int, list[int]]) -> tuple[int, int]:
    """Which it is, and with what."""
    return (_DESTROY, 0) if _destroys(row) else (row[2][0], row[2][1])


def _difference(reading: _core.Reading) -> str:
    return (
        f"ranks are at different places: {_listed(reading.rows)}. Every rank has to run the same "
        "training forwards, backwards and steps; only evaluations may differ in number"
    )


def _listed(rows: Sequence[tuple[str, int, list[int]]], engines: Sequence[str] = ()) -> str:
    """What each rank is at, of which of the `engines`, by rank."""
    places = [_PLACES[kind].format(count) for kind, count, _ in rows]
    of = engines or [""] * len(places)
    return "; ".join(
        f"rank {rank} {place}{engine}"
        for rank, (place, engine) in enumerate(zip(places, of, strict=True))
    )


_PLACES = {
    "forward": "begins a training forward ({} passes before it)",
    "backward": "begins a backward ({} passes before it)",
    "local_backward": "begins a backward without a reduction ({} passes before it)",
    "evaluation": "begins an evaluation",
    "boundary": "is between passes ({} before)",
    "need": "needs a parameter",
    "serve": "has failed, and stands in ({} passes before)",
}
