"""Calls that all ranks make together, beside their micro-batches.

What it guarantees: nothing of this engine's is under way when ranks come to such a call, and whom
the others wait for in vain is known with the reason. What it does not do: it makes none of the
collectives that the calls are about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zerort.errors import StepError
from zerort.params.roll import COLLECTIVE, Absent
from zerort.step.deferred import DeferredReductions
from zerort.step.phases import Destroyed, Idle, Lost

__all__ = ["JointCalls"]


class JointCalls(DeferredReductions):
    """`join`, what precedes a save or a load, and the gate before collectives of the caller's."""

    @contextmanager
    def join(self, *, by_initial_world: bool, throws: bool) -> Iterator[None]:
        """Within, ranks may run out of data at different steps."""
        if self.part.joined:
            raise StepError("join() inside join(): one context is enough")
        self._demand("join()")
        self._refuse_unmanaged("join()")
        with self._parting():
            self.part.passes.meet("join()")
        with self.part.join(by_initial_world=by_initial_world, throws=throws):
            try:
                yield
                self.recover()
                self._rest()
                with self._parting():
                    self.part.serve()
            except BaseException as error:
                if not isinstance(self._phase, Lost | Destroyed):
                    self.part.leave(error)
                    self._phase = Idle()
                raise

    def pause(self, call: str) -> None:
        """Before `call`, which all ranks make together: nothing is under way any more."""
        if self.part.joined:
            raise StepError(
                f"{call} inside join(): a rank that is out of data would not make it; leave the "
                "context first"
            )
        match self._phase:
            case Lost():
                return  # the call fails by itself, or needs no peers
            case _:
                self._demand(call)
        if call == "load_checkpoint()":
            self._refuse_pinned(call)
        with self._parting():
            self._reduction.land()
            self.part.passes.meet(call)
            self._reduction.drain()

    def meet(self, call: str) -> None:
        """Before `call`, a collective of the caller's own: at the gate. Between passes over
        shards, ranks first take part in the evaluations of those that have not come.
        """
        passes = self.part.passes
        if self.closed:
            return
        if self._raised():
            self._settle("a direct loss.backward() raised", owes=True)
        if isinstance(self._phase, Lost):
            self._demand(call)
        with self._parting():
            between_passes = isinstance(self._phase, Idle) and not passes.is_open
            if passes.shards and between_passes and not self.part.joined:
                self._meet_between_passes(call)
            if self.gate is not None:
                self.gate.pass_through(call)

    def _meet_between_passes(self, call: str) -> None:
        try:
            self.part.passes.meet(COLLECTIVE)
            self._reduction.drain()
        except Absent:
            if self.gate is not None:
                self.gate.pass_through(call)  # who stands in has come there before, with its reason
            raise

    def _refuse_pinned(self, call: str) -> None:
        """`call` changes the shards. What is pinned is so on all ranks, and all raise."""
        if self.part.passes.pinned:
            raise StepError(
                f"{call} inside GatheredParameters: what is kept whole would be the old values; "
                "leave the context first"
            )
