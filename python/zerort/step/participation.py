"""What this rank takes part in: passes, rolls and the vote, each of which its peers wait for.

What it guarantees: where a rank can bring nothing, or has failed, it still takes part, on zeros, so
that every collective of its peers' has a partner. What it does not do: it does not know whose
backward runs or what may be called when; that is the transaction's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from zerort.errors import CommError, PlanMismatch, StepError
from zerort.grads.reduction import Reduction
from zerort.grads.tasks import LossScaling
from zerort.step.accumulation import Accumulation, UnusedParameters
from zerort.step.averaging import Averaging
from zerort.step.boundary import Boundary, Outcome
from zerort.step.join import Join, JoinEnded, Next
from zerort.step.progress import Progress

__all__ = ["Participation"]


class Participation:
    """One rank's part in the window under way."""

    def __init__(
        self,
        averaging: Averaging,
        reduction: Reduction,
        boundary: Boundary,
        progress: Progress,
        unused: UnusedParameters,
    ) -> None:
        self.averaging = averaging
        self.reduction = reduction
        self.boundary = boundary
        self.progress = progress
        self._unused = unused
        self._join: Join | None = None

    @property
    def accumulation(self) -> Accumulation:
        """Where in the window this rank stands."""
        return self.averaging.accumulation

    # A backward.

    def open(self, scaling: LossScaling | None) -> None:
        """A backward begins; `scaling` is None for a loss that is not scaled.

        Raises `StepError` naming a parameter that has moved.
        """
        self.averaging.note(scaling)
        self.boundary.optimizer.check()
        self._follow()

    def begin(self) -> None:
        """Begins the pass in which the backward's gradients are reduced."""
        self.roll(Next.PASS)
        self.reduction.begin(self.averaging.factor)

    def close(self, *, first: bool) -> None:
        """The backward is over, the micro-batch's `first` or a further one."""
        if self.reduction.in_pass:
            self._unused.report(self.reduction.finish())
        else:
            self.reduction.collect()
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
        self.reduction.drain()
        self.reduction.drop()
        self.reduction.reset()
        self.accumulation.window.forget()

    # The boundary.

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
        self.reduction.drop()
        if owes and self.accumulation.reduces and not self.reduction.in_pass:
            self.begin()
        self.reduction.abort()
        if self.accumulation.boundary:
            self.roll(Next.VOTE)
            self.boundary.cross(self.averaging.factor, window.failure)

    def abandon(self) -> None:
        """Nobody goes on with this window."""
        self.reduction.abort()
        self.reduction.reset()
        self.accumulation.end_window(self.accumulation.window.taken)

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

    def leave(self, error: BaseException) -> None:
        """An exception leaves the context: the others hear of it where they wait next."""
        assert self._join is not None
        with suppress(CommError):
            self.abandon()
            with suppress(JoinEnded):
                reason = f"{type(error).__name__}: {error}"
                self._join.roll(Next.FAILED, self.accumulation.window, reason)

    def roll(self, coming: Next) -> None:
        """Within `join`, meets the other ranks."""
        if self._join is not None:
            # no rank may wait here for another that waits for its sums
            self.reduction.drain()
            self._join.roll(coming, self.accumulation.window)

    def reduce_nothing(self) -> None:
        """Takes part in a pass with what has waited here, which mostly is nothing."""
        self._follow()
        self.reduction.begin(self.averaging.factor)
        self.reduction.finish()
        self.reduction.drain()

    def end_step(self) -> None:
        """Takes part in a step. Raises what this rank alone is to hear of."""
        try:
            outcome = self._cross()
        except (StepError, PlanMismatch):
            if self.boundary.broken is not None:
                raise
            return  # it is raised on all ranks, and those that go on call again
        self._report(outcome, self.progress.arguments)

    # The parts of a step.

    def _cross(self) -> Outcome:
        failure, correction = (
            self.accumulation.window.failure,
            self.averaging.correction(self._join),
        )
        return self.boundary.cross(self.averaging.factor, failure, correction)

    def _report(self, outcome: Outcome, arguments: Mapping[str, Any]) -> None:
        try:
            self.progress.after(outcome, self.averaging.samples(self._join), arguments)
        finally:
            self.boundary.let_out()

    def _follow(self) -> None:
        if self.reduction.follow():
            self.boundary.optimizer.split()
