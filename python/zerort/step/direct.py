"""Backwards that this engine has not begun: `loss.backward()` of the user's own, or another
engine's.

Which backward is whose is asked of autograd (`grads.tasks`). The user's own, on what the module
returned or `scale` made, begins a pass with its first gradient. Another engine's leaves its
gradients in `.grad`, where this engine's next call finds them, unless they have been dropped by
then. One that no hook has announced is found at `step` by its gradients.

An evaluation within a backward or on another thread changes nothing here: a backward that still
runs is not one that has raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zerort.grads.compiled import refuse_foreign
from zerort.grads.tasks import GraphTask, LossScaling, losses_here, running_here
from zerort.step.participation import Participation
from zerort.step.phases import Away, Backward, Destroyed, Idle, Lost, Reached, Settled, between
from zerort.step.settling import Settling

__all__ = ["DirectBackwards"]


class DirectBackwards(Settling):
    """Follows such a backward through its phases, by hooks where there are some."""

    def __init__(self, part: Participation) -> None:
        super().__init__(part)
        self._begins: Callable[[], None] = self.reached
        """What a hook calls in a backward that comes to the module."""
        part.passes.owner = self

    # Everything here runs in hooks.

    def dropped(self) -> None:
        """All ranks have dropped the window."""
        self.part.drop()

    def parted(self) -> None:
        """Ranks have parted, maybe in another engine's call."""
        if not isinstance(self._phase, Lost | Destroyed | Away):
            self._abandon()

    def reached(self) -> None:
        """A backward comes to the module."""
        if self._listener.is_deaf or not isinstance(self._phase, Idle | Settled):
            self.refuse_away("a backward")
            return
        refuse_foreign()
        running = running_here(self)
        foreign = running is not None and running.owner is not self
        if foreign:
            self._listener.mark()
        else:
            self._listener.arm(self._announced)
        self.part.reach(announced=False, foreign=foreign)
        scaling = running.scaling if running is not None else None
        self._phase = Reached(GraphTask(self._ended), between(self._phase), scaling, foreign)

    def _announced(self) -> None:
        """The first gradient has come."""
        reached = self._phase
        if not isinstance(reached, Reached):
            return
        self._phase = Backward(reached.before, task=reached.task)
        self._open(reached.scaling)

    def _ended(self) -> None:
        """It is over, and has not raised."""
        match self._phase:
            case Reached(before=before, scaling=scaling, foreign=foreign):
                came = self._listener.disarm()
                if came and not foreign:
                    self._announced()  # it has touched no parameter with a hook
                    self._close_direct()
                else:
                    self.part.passes.close()
                    self._phase = replace(before, resting=scaling) if came else before
            case Backward(task=GraphTask()):
                self._close_direct()
            case _:
                pass

    def _close_direct(self) -> None:
        self.part.events.scaled(losses_here(self))
        self._close()

    # The parts of a backward.

    def _open(self, scaling: LossScaling | None) -> None:
        """A backward begins; `scaling` is None for a loss that is not scaled."""
        self.part.open(scaling)
        if self.part.accumulation.reduces:
            self.part.begin()
            if isinstance(self._phase, Backward):
                self._phase = replace(self._phase, owes=False)

    def _close(self) -> None:
        """A backward is over."""
        running = self._phase
        assert isinstance(running, Backward)
        first = not running.before.backwards or not self.part.accumulation.managed
        self.part.close(first=first)
        self._phase = Idle(running.before.backwards + 1)

    # What no hook has announced.

    def _find_backward(self) -> None:
        """Takes what a backward that no hook has announced has left in `.grad`."""
        before = between(self._phase)
        if before.resting is not None and self._listener.holds_gradients():
            self._take(before.resting)
        elif not before.backwards and self._listener.holds_gradients():
            self._take(None)

    def _take(self, scaling: LossScaling | None) -> None:
        """Takes what a backward that this engine has not begun has left in `.grad`."""
        self._phase = Backward(between(self._phase))
        self.part.reach(announced=False)
        self._open(scaling)
        self._close()
