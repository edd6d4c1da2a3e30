"""How a pass runs along its list: by the plan's one schedule, or by what the core's gatherer hands
out.

`Straight` is a pass where every rank has the parameters whole: one list a plan, and a cursor. In a
`Routed` one parameters are gathered and freed meanwhile, so that gradients and needs move one
cursor together, and the core answers with actions. A routed backward that follows no list reduces
nothing while it runs: its sums are *owed*, and go out behind the next roll call in which no rank
asks for a unit, because a rank that waited for sums before would not hear it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from zerort import _core
from zerort.run.executor import Executor

__all__ = ["Commands", "Course", "Routed", "Straight"]


Commands = Sequence[tuple[str, int]]
"""Kind, and number of the bucket, unit or stop."""


class Course(Protocol):
    """How a pass runs along its list."""

    waits: bool
    """Whether sums may be waited for at any time."""
    observes: bool
    """Whether a pass that the first gradient's hook begins only observes."""

    def load(self, plan: _core.Plan) -> None:
        """Takes the plan's lists."""

    def commands(self) -> Commands:
        """The list of the pass under way."""

    def place(self) -> int:
        """Everything below it in the list has been handed out, whether `run` has or not."""

    def begin(self) -> None:
        """A pass begins."""

    def run(self, hi: int) -> None:
        """The core's reducer has answered `hi`."""

    def finish(self) -> list[int] | None:
        """The backward is over: launches what is left. Returns who has had no gradient, by id; None
        where that is known by now from what was packed.
        """


class Straight:
    """Along the plan's schedule."""

    waits = True
    observes = False

    def __init__(self, plan: _core.Plan, reducer: _core.Reducer, executor: Executor) -> None:
        self._reducer = reducer
        self._executor = executor
        self.load(plan)

    def load(self, plan: _core.Plan) -> None:
        """Takes the plan's schedule."""
        self._schedule = list(plan.schedule)

    def commands(self) -> Commands:
        """The schedule."""
        return self._schedule

    def place(self) -> int:
        """Nothing is, but by `run`."""
        return 0

    def begin(self) -> None:
        """At the head of the schedule."""
        self._reducer.begin()

    def run(self, hi: int) -> None:
        """All below `hi`."""
        self._executor.run(hi)

    def finish(self) -> None:
        """The rest of the schedule. Everything is packed then."""
        self._executor.launch_all()
        self._reducer.finish()


class Routed:
    """Along the list of the pass that is under way; `index` is the list's, or None where it follows
    none.
    """

    waits = False
    observes = True

    def __init__(
        self, plan: _core.Plan, reducer: _core.Reducer, executor: Executor, gatherer: _core.Gatherer
    ) -> None:
        self.gatherer = gatherer
        self.index: int | None = None
        self.owed = False
        self._reducer = reducer
        self._executor = executor
        self.load(plan)

    def load(self, plan: _core.Plan) -> None:
        """Takes the lists of the passes that are known."""
        self.plan = plan
        self.trains = bool(plan.schedule)
        """Whether anything is reduced."""
        self._lists = [each.commands for each in plan.lists]

    def commands(self) -> Commands:
        """The list's; none where there is no list."""
        return () if self.index is None else self._lists[self.index]

    def place(self) -> int:
        """As far as needs have gone, which wait for no gradient."""
        following = self.gatherer.explain()
        return len(self.commands()) if following is None else following[0]

    def begin(self) -> None:
        """Along the list, if there is one; else the core learns from this pass."""
        if not self.gatherer.in_pass:
            self._reducer.begin()
        elif self.index is None:
            self._reducer.begin(observe=True)
        else:
            self._reducer.begin(list=self.index)

    def run(self, hi: int) -> None:
        """What `hi` stands for in the list."""
        self._executor.enqueue(self.gatherer.reached(hi))

    def finish(self) -> list[int] | None:
        """The rest of the list; all of the schedule where no pass of parameters is under way."""
        finished = self._reducer.finish()
        if self.gatherer.in_pass:
            self.close(complete=self._executor.current.failure is None)
            self.owed = self.index is None
        else:
            self._executor.enqueue(self.plan.program)
            self._executor.reach()
        return list(finished.absent) if self.owed else None

    def close(self, *, complete: bool) -> None:
        """The rest of the list, behind `finish` or where no gradient is reduced. From one that is
        not `complete` nothing is learnt.
        """
        self._executor.enqueue(self.gatherer.close(complete=complete))
        self._executor.reach()

    def abandon(self) -> None:
        """All ranks drop the pass that is under way, and what is owed."""
        self.owed = False
        if self._reducer.in_pass:
            self._reducer.finish()

    def pay(self) -> None:
        """Launches the sums of a backward that has followed no list."""
        if self.owed:
            self.owed = False
            self._executor.enqueue(self.plan.program)
            self._executor.reach()
