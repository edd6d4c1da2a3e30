"""What an engine may be asked for when, and how a failure is carried through.

A collective in flight cannot be taken back, so a rank that fails *settles*: it takes part in
whatever its peers still wait for, on zeros, and puts its failure into the vote at the boundary.
Only then does its exception go on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from zerort.errors import CommError, StepError
from zerort.grads.tasks import GraphTask, in_backward
from zerort.mesh import Gate, leave_last_words
from zerort.params.roll import FAILED, Diverged, Left
from zerort.step.join import JoinEnded
from zerort.step.participation import Participation
from zerort.step.phases import (
    Away,
    Backward,
    Destroyed,
    Idle,
    Lost,
    Phase,
    Reached,
    owes_pass,
)

__all__ = ["AWAY", "Settling"]

_log = logging.getLogger("zerort")

AWAY = "while states are offloaded by engine.offload_states(): call engine.reload_states() first"


class Settling:
    """Owns the phase. What the peers wait for is done by `part`."""

    def __init__(self, part: Participation) -> None:
        self.part = part
        self._reduction, self._listener = part.reduction, part.reduction.listener
        self._phase: Phase = Idle()
        self.gate: Gate | None = None
        """Where ranks meet before collectives of the caller's own, if it has any."""

    @property
    def closed(self) -> bool:
        """Whether it has been."""
        return isinstance(self._phase, Destroyed)

    def recover(self) -> None:
        """Settles for a backward of the user's own that has raised: nothing else tells of it."""
        if self._interrupted():
            self._settle("a direct loss.backward() raised", owes=True)

    def refuse_away(self, call: str) -> None:
        """Raises `StepError` where states are offloaded."""
        if isinstance(self._phase, Away):
            raise StepError(f"{call} {AWAY}")

    def _demand(self, call: str, *, recovering: bool = True) -> None:
        """Raises where `call` cannot be."""
        self._hear_of_lost_updates()
        match self._phase:
            case Destroyed():
                raise StepError(f"{call} after engine.destroy(): the engine has given all back")
            case Lost(reason):
                raise CommError(
                    f"{call} after ranks have parted: restart the job from a checkpoint. What "
                    f"parted them: {reason}"
                )
            case Away():
                self.refuse_away(call)
            case Backward(task=None):
                raise StepError(f"{call} while engine.backward(loss) runs: wait until it is over")
            case Reached() | Backward() if in_backward():
                raise StepError(f"{call} inside a loss.backward(): wait until it is over")
            case _:
                if recovering:
                    self.recover()

    def _hear_of_lost_updates(self) -> None:
        """Whoever asked for updated parameters that are lost has raised; the engine follows."""
        lost = self._reduction.unpublished
        if lost is not None and not isinstance(self._phase, Lost | Destroyed):
            self._phase = Lost(lost)
        if lost is not None and self.part.boundary.half_updated is None:
            self.part.boundary.half_updated = (
                f"updated parameters were lost on their way: {lost}; restart from a checkpoint"
            )

    def _raised(self) -> bool:
        """Whether a backward that this engine has not begun has brought gradients and raised."""
        match self._phase:
            case Backward(task=GraphTask() as task):
                return not task.runs
            case Reached(task=task, before=before) if not task.runs:
                self.part.passes.close()
                self._phase = before
                return self._listener.disarm()
            case _:
                return False

    def _interrupted(self) -> bool:
        """`_raised`, asked by a call that cannot be within a backward.

        On an accelerator a thread of autograd's may hold a backward for a moment after it has
        raised.
        """
        match self._phase:
            case Backward(task=GraphTask()):
                return True
            case Reached(before=before):
                self.part.passes.close()
                self._phase = before
                return self._listener.disarm()
            case _:
                return False

    # The end of a micro-batch, and failures.

    def _advance(self) -> None:
        """The micro-batch is over."""
        self.part.accumulation.advance()
        self._rest()
        self.part.events.ended()

    def _rest(self, backwards: int = 0) -> None:
        if not isinstance(self._phase, Lost | Destroyed):
            self._phase = Idle(backwards)

    def _rest_at(self, phase: Phase) -> None:
        """After a failure that has been settled, unless there is no peer left."""
        if not isinstance(self._phase, Lost):
            self._phase = phase

    @contextmanager
    def _parting(self) -> Iterator[None]:
        """Within, a collective that fails is the last one."""
        try:
            yield
        except CommError as error:
            self._phase = Lost(str(error))
            raise

    @contextmanager
    def _settling(self, after: Phase) -> Iterator[None]:
        """Within, an exception leaves only once the peers have its reason; the phase is `after`."""
        try:
            with self._parting():
                yield
        except CommError:
            raise
        except (JoinEnded, Diverged):
            self._abandon()
            raise
        except BaseException as error:
            self._settle(f"{type(error).__name__}: {error}", owes=owes_pass(self._phase))
            if self.part.accumulation.ends_on_failure:
                self._rest_at(after)
            raise

    def _settle(self, failure: str, *, owes: bool) -> None:
        """After a failure: takes part in what is left of the micro-batch."""
        self.announce(failure, sys.exc_info()[1])
        try:
            with self._parting():
                self.part.fail(failure, owes=owes)
        except (JoinEnded, Diverged):
            self._abandon()
            return
        except StepError:
            pass  # the verdict on our own failure, which the caller sees at first hand
        except BaseException as error:
            if isinstance(error, CommError) and self.gate is not None:
                return  # the peers have heard of it there, and have left
            if not isinstance(self._phase, Lost):  # Ctrl-C, while peers wait
                self._phase = Lost(
                    f"{type(error).__name__} before the others had heard of: {failure}"
                )
            raise
        if self.part.accumulation.ends_on_failure:
            self._advance()
        else:  # the step that ends the window is still to come, and votes
            self._rest(backwards=1)

    def announce(self, failure: str, error: BaseException | None) -> None:
        """To peers that wait before a collective of the caller's own, or are about to."""
        if self.gate is not None:
            if error is not None:
                leave_last_words(error)
            self.gate.fail(failure)

    def finish(self, error: BaseException | None) -> bool:
        """Before all ranks give the engine back: ends what a backward without a `step` has begun,
        which a peer further along its list may wait for. Of `error`, which is being handled here,
        peers hear that go on. Returns whether there are peers that take part in this.
        """
        if error is not None:
            leave_last_words(error)
            if self.gate is not None:
                self.gate.fail(f"{type(error).__name__}: {error}")
        if self.gate is not None:
            self.gate.close()
        if isinstance(self._phase, Lost):
            return False
        self._end_together(failed=error is not None)
        return True

    def _end_together(self, *, failed: bool) -> None:
        passes = self.part.passes
        passes.refusal = None
        try:
            self._reduction.land()
            self._reduction.abort()
            passes.close(complete=False)
            passes.meet("destroy()", FAILED if failed else 0)
            self._reduction.drain()
        except Left:
            return
        except (CommError, Diverged) as error:
            if failed:
                return  # who raises knows why
            _log.warning("destroy(): what was under way could not be ended: %s", error)

    def _abandon(self) -> None:
        """No rank goes on with this window."""
        with self._parting():
            self.part.abandon()
        self._rest()
