"""What this rank takes part in: passes, rolls and the vote, each of which its peers wait for.

What it guarantees: where a rank can bring nothing, or has failed, it still takes part, on zeros, so
that every collective of its peers' has a partner. What it does not do: it does not know whose
backward runs or what may be called when; that is the transaction's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from zerort.errors import CommError, PlanMismatch, StepError
from zerort.grads.reduction import Reduction
from zerort.grads.tasks import LossScaling
from zerort.params.passes import Passes, Resident
from zerort.params.roll import Diverged
from zerort.step.accumulation import Accumulation, UnusedParameters
from zerort.step.averaging import Averaging
from zerort.step.boundary import Boundary, Outcome
from zerort.step.events import Events
from zerort.step.interrupts import held
from zerort.step.join import Join, JoinEnded, Next
from zerort.step.meeting import Meeting
from zerort.step.progress import Progress

__all__ = ["Participation"]

T = TypeVar("T")


class Participation:
    """One rank's part in the window under way."""

    def __init__(
        self,
        averaging: Averaging,
        reduction: Reduction,
        boundary: Boundary,
        progress: Progress,
        unused: UnusedParameters,
        passes: Passes | Resident,
    ) -> None:
        self.averaging = averaging
        self.reduction = reduction
        self.boundary = boundary
        self.progress = progress
        self.passes = passes
        self._unused = unused
        self._join: Join | None = None
        self._meeting = self._meets()
        self._reduces = False
        """Whether the pass that is open reduces gradients, in it or behind it."""

    @property
    def accumulation(self) -> Accumulation:
        """Where in the window this rank stands."""
        return self.averaging.accumulation

    @property
    def events(self) -> Events:
        """What features hear."""
        return self.progress.events

    def _meets(self) -> Meeting | None:
        uneven = self.accumulation.every and not self.accumulation.managed
        return Meeting(self.boundary.mesh.control) if uneven and not self.passes.shards else None

    # A forward.

    def compute(self, run: Callable[[], T], *, trains: bool) -> T:
        """A forward, in a pass of its own."""
        self.passes.open("forward" if trains else "evaluation", self)
        try:
            outputs = run()
        except BaseException:
            self.passes.close(complete=False)
            raise
        self.passes.close()
        return outputs

    # A backward.

    def reach(self, *, announced: bool, foreign: bool = False) -> None:
        """A backward comes to the module; it may need parameters from now on. Of one that is not
        `announced` it is not known whether it brings gradients: they are reduced behind it.
        """
        self._reduces = self.accumulation.reduces and not foreign
        if self._reduces and announced:
            self.passes.open("backward", self)
        else:
            self.passes.open("local_backward", self, owes=self._reduces)

    def open(self, scaling: LossScaling | None) -> None:
        """A backward begins; `scaling` is None for a loss that is not scaled.

        Raises `StepError` naming a parameter that has moved.
        """
        self.averaging.note(scaling)
        self.boundary.optimizer.check()
        self.follow()

    def begin(self) -> None:
        """Begins the pass in which the backward's gradients are reduced."""
        self.roll(Next.PASS)
        self.reduction.begin(self.averaging.factor)
        self.accumulation.window.waits = False
        self.passes.bring()

    def close(self, *, first: bool) -> None:
        """The backward is over, the micro-batch's `first` or a further one."""
        if self.reduction.in_pass:
            absent = self.reduction.finish()
            self.passes.close()
            self._unused.report(absent)
        else:
            self.passes.close()
            self.reduction.collect()
            self.accumulation.window.waits = True
        self.accumulation.window.given += first

    def keep(self, scaling: LossScaling) -> None:
        """Another engine's backward has left gradients, its loss scaled like this, unless they have
        been dropped since: they wait for the next pass.
        """
        if self.reduction.listener.holds_gradients():
            self.averaging.note(scaling)
            self.reduction.listener.rest()

    def drop(self) -> None:
        """Forgets all gradients since the last step."""
        self.reduction.settle()
        self.reduction.local.drop()
        self.reduction.reset()
        self.accumulation.window.forget()
        self.events.dropped()

    # The boundary.

    def meet(self) -> None:
        """All ranks are at the end of the window: their sums come without this rank's help, and
        what has been published is there.
        """
        self.reduction.land()
        with self.boundary.sink.range("retire"):
            self.passes.meet(serving=self.accumulation.window.failure is not None)
            self.reduction.drain()

    def step(self, arguments: Mapping[str, Any]) -> None:
        """Ends the window with the vote and the update. Raises what `Boundary.cross` and
        `Progress.after` raise.
        """
        self.roll(Next.VOTE)
        self._report(self._cross(), arguments)

    def fail(self, failure: str, *, owes: bool) -> None:
        """Takes part in what is left of the micro-batch on zeros, at the boundary also in the vote,
        which hears of `failure`. `owes`: the peers expect a pass that has not begun here.
        """
        window = self.accumulation.window
        window.failure = window.failure or failure
        self.reduction.local.drop()
        if owes and self._is_expected() and self.accumulation.owes and not self.reduction.in_pass:
            self.begin()
        self.reduction.abort()
        self.passes.close(complete=False)
        if self.accumulation.boundary:
            self.meet()
            self.roll(Next.VOTE)
            self._vote(window.failure, 1.0)
        else:
            self.passes.crossed()

    def _is_expected(self) -> bool:
        """Whether a pass that has not begun here is what the peers are at, or come to."""
        if self.passes.is_open:
            return self._reduces
        if self.passes.shards:
            return self.passes.stand_in() == "backward"
        # elsewhere ranks do not meet before a pass, and the standby finds out
        return self._join is not None or self._meeting is not None

    def abandon(self) -> None:
        """No rank goes on with this window."""
        self.passes.abandon()
        self.reduction.abort()
        self.reduction.reset()
        self.accumulation.end_window(self.accumulation.window.taken)
        self.events.dropped()

    # Ranks that run out of data.

    @property
    def joined(self) -> bool:
        """Whether this is within `join`."""
        return self._join is not None

    @contextmanager
    def join(self, *, by_initial_world: bool, throws: bool) -> Iterator[None]:
        """Within, ranks meet before every pass and every vote."""
        self._join = Join(self.boundary.mesh.job, by_initial_world=by_initial_world, throws=throws)
        try:
            yield
        finally:
            self._join = None

    def serve(self) -> None:
        """Out of data: completes the peers' steps on zeros until no rank has data left."""
        assert self._join is not None
        self._join.serve(self)
        self.passes.crossed()

    def leave(self, error: BaseException) -> None:
        """An exception leaves the context: the others hear of it where they wait next."""
        assert self._join is not None
        with suppress(CommError):
            if not isinstance(error, JoinEnded | Diverged):  # else all ranks know of it
                self.passes.close(complete=False)
                self._until_roll()
            self.abandon()
            with suppress(JoinEnded):
                reason = f"{type(error).__name__}: {error}"
                self._join.roll(Next.FAILED, self.accumulation.window, reason)

    def roll(self, coming: Next) -> None:
        """Meets the other ranks, where they do before passes and votes."""
        if self._meeting is not None:
            self._meet_unmanaged(self._meeting, coming)
        if self._join is not None:
            if coming is Next.DONE:
                self._until_roll()
            # no rank may wait here for another that waits for its sums
            self.reduction.settle()
            self._join.roll(coming, self.accumulation.window)

    def _meet_unmanaged(self, meeting: Meeting, coming: Next) -> None:
        if coming is Next.PASS:
            meeting.before_pass()
        else:
            meeting.before_vote(self._take_part)

    def _take_part(self) -> None:
        """In a pass of the others'. What is raised here reaches the vote."""
        try:
            self.reduce_nothing()
            self.accumulation.window.waits = False
        except CommError:
            raise
        except Exception as error:
            window = self.accumulation.window
            window.failure = window.failure or f"{type(error).__name__}: {error}"
            self.reduction.abort()

    def _until_roll(self) -> None:
        """Takes part in passes of the others' until they roll too."""
        while self.passes.stand_in(failed=False) == "local_backward":
            self.passes.close(complete=False)

    def reduce_nothing(self) -> None:
        """Takes part in a pass with what has waited here, which mostly is nothing."""
        self.follow()
        self.reduction.begin(self.averaging.factor)
        self.reduction.finish()
        self.passes.close(complete=False)
        self.reduction.settle()

    def end_step(self) -> None:
        """Takes part in a step. Raises what this rank alone is to hear of."""
        self.meet()
        try:
            outcome = self._cross()
        except (StepError, PlanMismatch):
            if self.boundary.broken is not None:
                raise
            return  # it is raised on all ranks, and those that go on call again
        self._report(outcome, self.progress.arguments)

    # The parts of a step.

    def _cross(self) -> Outcome:
        return self._vote(self.accumulation.window.failure, self.averaging.correction(self._join))

    def _vote(self, failure: str | None, correction: float) -> Outcome:
        try:
            failure = self._prepare(failure)
            return self.boundary.cross(self.averaging.factor, failure, correction)
        finally:
            self.passes.crossed()

    def _await_all(self, *, failed: bool) -> None:
        """Where the host runs ahead: all ranks have launched all that they will, so that a wait for
        the device is no wait for a rank that is gone. Raises `CommError`. Ctrl-C comes out behind
        it, so that what this rank launches next pairs with its peers' vote.

        The device is still at work meanwhile, so this costs no time where it sets the pace.
        """
        if self.reduction.executor.device.blocks:
            return
        with held() as interrupts, self.boundary.standby.attending(failed=failed):
            self.boundary.mesh.control.all_reduce(torch.zeros(1))
        interrupts.run()

    def _prepare(self, failure: str | None) -> str | None:
        """What features do before the vote; returns why this rank fails, if it does."""
        try:
            self._await_all(failed=failure is not None)
            with self.boundary.standby.attending(failed=failure is not None):
                return self.events.before_vote(failure)
        except CommError:
            raise
        except BaseException as error:  # Ctrl-C: the peers are about to vote
            with suppress(StepError):
                reason = f"{type(error).__name__} before the vote"
                self.boundary.cross(self.averaging.factor, reason)
            raise

    def _report(self, outcome: Outcome, arguments: Mapping[str, Any]) -> None:
        try:
            self.progress.after(outcome, self.averaging.samples(self._join), arguments)
        finally:
            self.boundary.let_out()

    def follow(self) -> None:
        """Follows freezing and unfreezing. Raises `StepError` naming a parameter that has moved."""
        if self.reduction.follow():
            self.boundary.optimizer.split()
