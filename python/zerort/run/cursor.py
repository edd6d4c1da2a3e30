"""A second cursor into the schedule: what has run of one list, behind what is allowed to.

What it guarantees: commands run in the order of the list and never before the core has allowed
them; one that was broken off is run again, and loses the window. Where waiting blocks the host, a
command whose bucket or memory is still under way ends a run that must not wait.

What it does not do: it decides nothing about the order.
"""

from __future__ import annotations

from zerort.run.hops import Pass
from zerort.run.launches import Launches
from zerort.run.program import Program

__all__ = ["Cursor"]


class Cursor:
    """Of one engine; `polls` where waiting for a collective blocks the host."""

    def __init__(self, launches: Launches, current: Pass, *, polls: bool) -> None:
        self._launches = launches
        self._pass = current
        self._polls = polls
        self._program = Program()
        self._place = self._allowed = 0

    def load(self, program: Program) -> None:
        """Another list, from its head on."""
        self._program = program
        self._launches.load(program.flights)
        self._place = self._allowed = 0

    def begin(self) -> None:
        """A pass begins, at the head of the list."""
        self._launches.begin()
        self._place = self._allowed = 0

    def allow(self, hi: int) -> None:
        """What is below `hi` may run, and does as far as it goes without blocking."""
        self._allowed = max(self._allowed, hi)
        self._advance(self._allowed, wait=False)

    def allow_all(self) -> None:
        """So may the whole list."""
        self.allow(len(self._program.commands))

    def launch_all(self) -> None:
        """Runs it as far as its last Launch; waits where the window has no room."""
        self._allowed = len(self._program.commands)
        self._advance(self._program.launches_end, wait=True)

    def drain(self) -> None:
        """Runs all that is allowed, and waits for what each bucket's hops bring."""
        self._advance(self._allowed, wait=True)
        # hop by hop, so that the next one's collectives are under way together
        while waiting := [flight for flight in self._program.flights if flight.state.hop > 0]:
            for flight in waiting:
                self._launches.proceed(flight)

    def _advance(self, end: int, *, wait: bool) -> None:
        polls = self._polls and not wait
        self._follow_up()
        while self._place < end:
            verb, report, flight = self._program.commands[self._place]
            if polls and flight.under_way:
                return
            try:
                verb(flight)
            except BaseException as error:
                self._pass.lose(error)
                raise
            self._place += 1
            report(flight)
            self._follow_up()

    def _follow_up(self) -> None:
        try:
            self._launches.follow_up()
        except BaseException as error:
            self._pass.lose(error)
            raise
