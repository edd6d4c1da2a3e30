"""Where parameters are sharded: the queue of what the core hands out, and the units it is about.

What it guarantees: what `Actions` and `Gathers` do; an action that was broken off loses the window.
What it does not do: it takes no lock. Who calls has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zerort.memory import FlatModel
from zerort.run.actions import Action, Actions, Verb
from zerort.run.changes import Changes
from zerort.run.gathers import Following, Gathers, UnitFlight
from zerort.run.hops import Pass
from zerort.run.launches import Launches
from zerort.run.program import Program
from zerort.run.secondary import Replaced
from zerort.run.waits import Waits

__all__ = ["Units"]

Done = Callable[[Any], None]
"""What is done with a bucket or a unit."""


class Units:
    """Of one engine, whose rank is `rank`; `blocks` says whether waiting for a collective blocks
    the host.
    """

    def __init__(self, waits: Waits, current: Pass, rank: int, *, blocks: bool) -> None:
        self.changes = Changes()
        """What was written into parameters while they were whole."""
        self.following = Following(waits, blocks=blocks)
        self.replaced = Replaced(())
        """What this rank has put in the place of sharded values, for gathers inside a host."""
        self.flights: Mapping[int, UnitFlight] = {}
        self._waits = waits
        self._pass = current
        self._gathers = Gathers(waits, self.changes, rank, blocks=blocks)
        self._actions = Actions(polls=blocks)
        self._forgets: Sequence[int] = ()

    def load(self, program: Program, launches: Launches, flat: FlatModel) -> None:
        """What the core's numbers stand for; nothing is queued. Units stay once they are there."""
        self._actions.load(self._table(program, launches))
        if program.units and not self.flights:
            kept = [bucket for bucket in flat.buckets if bucket.secondary is not None]
            self.replaced = Replaced(kept)
            units = sorted({bucket.spec.unit for bucket in kept if bucket.spec.unit is not None})
            self._forgets = [*map(Verb.FORGET.of, units)]
        self.flights = program.units

    def close(self) -> None:
        """They are gathered no more."""
        for unit in self.flights.values():
            unit.close()

    def _table(self, program: Program, launches: Launches) -> dict[int, Action]:
        """By the core's number."""
        buckets = {flight.bucket.spec.id: flight for flight in program.flights}
        gathers = self._gathers
        verbs: list[tuple[Verb, Done, Done, Mapping[int, Any]]] = [
            (Verb.LAUNCH, launches.launch, launches.launched, buckets),
            (Verb.RETIRE, launches.retire, launches.retired, buckets),
            (Verb.GATHER, self._gather, gathers.gathering, program.units),
            (Verb.FREE, gathers.free, gathers.freed, program.units),
            (Verb.FORGET, UnitFlight.forget, _unseen, program.units),
        ]
        return {
            kind.of(number): Action(kind, self._whole_or_lost(verb), report, subject)
            for kind, verb, report, subjects in verbs
            for number, subject in subjects.items()
        }

    def enqueue(self, actions: Sequence[int]) -> None:
        """Queues what the core has handed out, and runs what goes without blocking."""
        self._actions.append(actions)
        self._actions.advance(wait=False)
        self.following.advance()

    def forgetting(self, units: Sequence[int] | None) -> Sequence[int]:
        """Actions behind which the next gathers of `units`, of all where None, are from all ranks;
        none where nothing is kept inside hosts.
        """
        if not self._forgets or units is None:
            return self._forgets
        return [*map(Verb.FORGET.of, units)]

    def reach(self) -> None:
        """Starts all that is queued; waits only where memory is in use."""
        self._actions.advance(wait=True)
        self._actions.follow()
        with self._waits.naming("all_gather between hosts"):
            self.following.reach()

    def land(self, units: Sequence[int]) -> None:
        """Waits for the values of `units`, whose gathers have started."""
        for number in units:
            self._gathers.land(self.flights[number])

    def drain(self) -> None:
        """Runs what is queued, waiting where it must."""
        self._actions.drain()

    def _gather(self, unit: UnitFlight) -> None:
        self._gathers.gather(unit, self._actions.serial)

    def _whole_or_lost(self, verb: Done) -> Done:
        """`verb`, which loses the window where it raises."""

        def run(subject: Any) -> None:
            try:
                verb(subject)
            except BaseException as error:
                self._pass.lose(error)
                raise

        return run


def _unseen(unit: UnitFlight) -> None:
    """The watch hears nothing of it."""
