"""The queue of what the core has handed out where parameters are sharded, and has not run yet.

What it guarantees: collectives start in the order of the queue, over all passes; what has started
is not started again, whatever raises between two lines, because an action leaves the queue behind
its verb and each verb has its effect once. A Retire that is still under way is passed over: it
waits for no peer's next collective, and who needs its memory or its result runs it then.

What it does not do: it decides nothing about the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

__all__ = ["Action", "Actions", "Verb"]


class Verb(Enum):
    """What is done; the value is the core's number. It knows no FORGET."""

    LAUNCH = 0
    RETIRE = 1
    GATHER = 2
    FREE = 3
    FORGET = -1

    def of(self, number: int) -> int:
        """The core's number of this action with a bucket or a unit; one below 0 where it has
        none.
        """
        return -1 - number if self is Verb.FORGET else 4 * number + self.value


class Action(NamedTuple):
    """Something to be done with a bucket or a unit."""

    verb: Verb
    run: Callable[[Any], None]
    report: Callable[[Any], None]
    subject: Any


class Actions:
    """First in, first out. `polls` where waiting blocks the host."""

    def __init__(self, *, polls: bool) -> None:
        self._polls = polls
        self._table: Mapping[int, Action] = {}
        self._queue: deque[Action] = deque()
        self._late: list[Action] = []
        self.serial = 0
        """Of the action that runs; no other has had it."""

    def load(self, table: Mapping[int, Action]) -> None:
        """What the core's numbers stand for from now on; nothing is queued."""
        self._table = table

    def append(self, codes: Iterable[int]) -> None:
        """Queues actions."""
        self._queue.extend(map(self._table.__getitem__, codes))

    def advance(self, *, wait: bool) -> None:
        """Starts what is queued; with `wait` all of it, else as far as it goes without blocking."""
        while self._queue:
            self._settle(wait=False)
            action = self._queue[0]
            if self._polls and action.verb is Verb.RETIRE and self._comes_later(action):
                self._late.append(action)
            else:
                if self._is_held_up(action) and not (wait and self._make_way(action)):
                    return
                action.run(action.subject)
                action.report(action.subject)
            self._queue.popleft()
            self.serial += 1

    def follow(self) -> None:
        """Starts the collectives that follow those under way, waiting for these. Whoever waits for
        a peer has done so, or that peer might wait for one of them.
        """
        for late in list(self._late):
            if _starts_another(late):
                self._retire(late)

    def drain(self) -> None:
        """Runs everything, waiting where it must."""
        self.advance(wait=True)
        self._settle(wait=True)

    def _comes_later(self, action: Action) -> bool:
        """Whether a Retire is passed over: behind one that was where it starts a collective, since
        those of a group go in one order on all ranks.
        """
        return action.subject.under_way or (bool(self._late) and _starts_another(action))

    def _is_held_up(self, action: Action) -> bool:
        if not self._polls or action.verb in (Verb.RETIRE, Verb.FORGET):
            return False
        return action.subject.under_way or bool(self._before(action))

    def _before(self, action: Action) -> list[Action]:
        """The Retires that were passed over of those who use a Launch's memory, and what has to
        come before them.
        """
        if action.verb is not Verb.LAUNCH:
            return []
        users = (action.subject, action.subject.before)
        found = [place for place, late in enumerate(self._late) if late.subject in users]
        if found and any(map(_starts_another, self._late)):
            return self._late[: found[-1] + 1]
        return [self._late[place] for place in found]

    def _make_way(self, action: Action) -> bool:
        for late in self._before(action):
            self._retire(late)
        return True

    def _settle(self, *, wait: bool) -> None:
        """Takes the results of Retires that were passed over; without `wait` the complete ones."""
        for late in list(self._late):
            if wait or not late.subject.under_way:
                self._retire(late)
            elif _starts_another(late):
                return

    def _retire(self, late: Action) -> None:
        late.run(late.subject)
        self._late.remove(late)
        late.report(late.subject)


def _starts_another(retire: Action) -> bool:
    """Whether a bucket has further hops."""
    return len(retire.subject.hops) > 1
