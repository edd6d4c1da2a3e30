"""Gradients that are reduced behind the backwards that made them.

What it guarantees: they are reduced in one pass of all ranks, once, where this micro-batch's
gradients are to be reduced at all; what raises meanwhile fails the micro-batch on all of them. What
it does not do: it knows no vote and no update, and looks for no gradient that no backward made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zerort.errors import CommError, StepError
from zerort.params.roll import Diverged
from zerort.step.direct import DirectBackwards
from zerort.step.join import JoinEnded
from zerort.step.phases import Backward, Destroyed, Lost, Settled, between

__all__ = ["DeferredReductions"]


class DeferredReductions(DirectBackwards):
    """The calls that wait with the reduction, and the one that makes it."""

    @contextmanager
    def coalesce(self) -> Iterator[None]:
        """Within, backwards add up on this rank, and are reduced in one pass behind it. What leaves
        it by an exception fails the micro-batch, for the peers expect that pass. Where none has
        been, there is none to reduce.
        """
        call, accumulation = "coalesce_grad_reduction()", self.part.accumulation
        self._demand(call)
        self._refuse_unmanaged(call)
        if accumulation.held:
            raise StepError(f"{call} nested inside no_sync() or itself: one context is enough")
        with accumulation.coalesce():
            try:
                yield
                waits = not isinstance(self._phase, Settled) and self._has_backwards()
            except BaseException as error:
                known = isinstance(error, CommError | JoinEnded | Diverged)
                if not known and not isinstance(self._phase, Settled | Lost | Destroyed):
                    self._settle(f"{type(error).__name__}: {error}", owes=True)
                    self._rest_at(Settled())
                raise
        if waits:
            with self._settling(Settled()):
                self._reduce_waiting()

    def reduce(self) -> None:
        """Reduces what has waited, where this micro-batch's gradients are to be reduced."""
        call = "allreduce_gradients()"
        self._demand(call)
        if self.part.accumulation.held:
            raise StepError(f"{call} inside no_sync(): leave the context first")
        with self._settling(Settled()):
            self._find_backward()
            if self.part.accumulation.window.waits:
                self._reduce_waiting()

    def _reduce_waiting(self) -> None:
        """A pass without a backward of its own, where one is due."""
        if not self.part.accumulation.reduces:
            return
        before = between(self._phase)
        self._phase = Backward(before)
        self.part.follow()
        self.part.reach(announced=True)
        self.part.begin()
        self._phase = Backward(before, owes=False)
        self.part.close(first=False)
        self._phase = before

    def _refuse_unmanaged(self, call: str) -> None:
        if not self.part.accumulation.managed:
            raise StepError(
                f'{call} with "managed_gradient_accumulation": false: a window ends where you '
                "step; leave the call or the key out"
            )

    def _has_backwards(self) -> bool:
        """Whether a backward of this micro-batch came to its end. Raises `StepError` where one of
        the user's own raised.
        """
        if self._interrupted():
            self._phase = Backward(between(self._phase))
            raise StepError(
                "a direct loss.backward() raised in this micro-batch; its gradients are dropped"
            )
        self._find_backward()
        return between(self._phase).backwards > 0
