"""Passes: a forward, a backward or an evaluation, in which parameters are gathered, used and freed.

Every pass opens with a *roll call*: one small all-reduce on the control group, in which each rank
says what it is at. Ranks that are alike follow the pass's list, if one has been learnt; a rank that
needs what its list has not, or that is further than the others, asks, and every rank answers at its
next opening. So no divergence of ranks pairs a wrong collective, and none hangs.

What this guarantees: collectives are started in the order in which the core hands them out; a need
returns only when the values are there; sums are waited for only behind a roll call in which no
rank asked (GAT-11). What it does not do: it decides no order, and it knows no micro-batch.

The roll call and its lists: `rust/core/src/gatherer.rs` and `roll.rs`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from zerort import _core
from zerort.errors import StepError
from zerort.grads.compiled import shield
from zerort.grads.course import Routed
from zerort.memory import undisturbed
from zerort.params.contract import NOBODY, Hooked, Owner
from zerort.params.needs import Needs
from zerort.params.net import Net
from zerort.params.roll import RollCall, code_of
from zerort.params.sharded import name_of
from zerort.params.strays import Strays
from zerort.run.changes import lost
from zerort.run.executor import Executor

__all__ = ["Passes", "Refusal", "Resident", "Room"]

_log = logging.getLogger("zerort")


@dataclass(frozen=True)
class Room:
    """How much may be whole at once, in elements, and how many stops ahead is gathered."""

    elements: int
    depth: int


@dataclass(frozen=True)
class Refusal:
    """Why nothing can be done with the parameters; but an evaluation, if it `evaluates`."""

    reason: str
    evaluates: bool


class Resident:
    """At stages 0 to 2: parameters are whole on every rank, and a pass needs no other rank."""

    shards = False
    trains = True
    is_open = False
    pinned = 0
    owner: Owner
    refusal: Refusal | None = None

    def open(self, kind: _core._At, opener: object, entry: int = 0, *, owes: bool = False) -> None:
        """Nothing."""

    def close(self, *, complete: bool = True) -> None:
        """Nothing."""

    def meet(self, call: str = "step()", detail: int = 0, *, serving: bool = False) -> None:
        """Nothing: the call's own collectives are the first."""

    def is_within(self, *, in_backward: bool) -> bool:
        """There is none."""
        return False

    def bring(self) -> None:
        """Nothing."""

    def watching(self, loss: torch.Tensor) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def crossed(self) -> None:
        """Nothing."""

    def stand_in(self, *, failed: bool = True) -> str:
        """There is none to stand in for."""
        return "boundary"

    def abandon(self) -> None:
        """Nothing."""

    def detach(self, *, whole: bool = True) -> None:
        """Nothing."""

    def shield(self) -> None:
        """Nothing: no hook is here."""


class Passes:
    """One rank's passes; `rolls` opens them."""

    shards = True

    def __init__(self, course: Routed, executor: Executor, rolls: RollCall) -> None:
        self.gatherer = course.gatherer
        self.is_open = False
        self.opener: object = None
        """Who has opened the pass, and closes it."""
        self._course = course
        self._executor = executor
        self._rolls = rolls
        rolls.abandon, rolls.parted = self.abandon, self.parted
        self.pinned = 0
        """Units that are kept whole beside the passes; all ranks keep the same."""
        self.needs = Needs(self.gatherer, executor, rolls)
        self.strays = Strays(rolls.rank)
        self._net = Net(self, executor, len(course.plan.units))
        self.hooks: Hooked = NOBODY
        self.owner: Owner = NOBODY
        self._met: bool | None = None
        """Whether there is something to learn behind the step that all ranks have met for, if they
        have.
        """
        self._thread = 0
        self.refusal: Refusal | None = None

    # What needs parameters.

    @property
    def trains(self) -> bool:
        """Whether a forward with a graph is the beginning of a micro-batch, which all ranks go
        through alike; where nothing is reduced it is an evaluation.
        """
        return self._course.trains

    @property
    def rests(self) -> bool:
        """Whether all units are kept whole."""
        return self.pinned > 0 and self.pinned >= len(self._course.plan.units)

    def lose(self, parameter: nn.Parameter) -> None:
        """The parameter was written while it was whole for the pass: the change goes with it."""
        self._executor.units.changes.note(name_of(parameter))

    def detach(self, *, whole: bool = True) -> None:
        """Takes the hooks off the model, which its parameters' values stay with, if they are the
        `whole` of one state.
        """
        self._rolls.leave()
        self.hooks.detach(whole=whole)

    def parted(self) -> None:
        """Ranks have parted in another engine's call."""
        self.owner.parted()

    def shield(self) -> None:
        """From now on no hook is traced by compiled autograd."""
        self._net.wrap = shield
        self.hooks.rehook()

    # A pass.

    @undisturbed
    def open(self, kind: _core._At, opener: object, entry: int = 0, *, owes: bool = False) -> None:
        """Opens a pass; `owes`: sums of its gradients will be owed.

        Raises `Diverged` where the ranks are not at the same place. An evaluation of a model that
        is kept whole needs no other rank, and opens none.
        """
        if kind == "forward" and not self.trains:
            kind = "evaluation"
        if kind == "evaluation" and self.rests:
            return
        self._refuse("a forward or a backward", evaluates=kind == "evaluation")
        self._refuse_other_threads()
        self.gatherer.open(kind, entry, torch._C._autograd._get_sequence_nr())
        self._thread = threading.get_ident()
        reading = self._rolls.decided([int(owes)])
        self._executor.enqueue(self.gatherer.begin())
        # What is not reduced in its backward waits in `.grad`, or for sums that are owed.
        self._course.index = reading.list if kind == "backward" else None
        self.is_open, self.opener = True, opener
        if kind in ("backward", "local_backward"):
            # Sums of the passes before have to be there before their memory is used again.
            self._executor.drain()
        if kind == "local_backward":
            self.bring()

    @undisturbed
    def is_within(self, *, in_backward: bool) -> bool:
        """Whether the caller is in the pass that is open. Raises `StepError` on another thread:
        what it would gather pairs with nothing of the other ranks'.
        """
        if not in_backward:
            self._refuse_other_threads()
        return self.is_open

    def _refuse(self, call: str, *, evaluates: bool = False) -> None:
        if self.refusal is not None and not (evaluates and self.refusal.evaluates):
            raise StepError(f"{call} {self.refusal.reason}")

    def _refuse_other_threads(self) -> None:
        if self._thread not in (0, threading.get_ident()):
            raise StepError(
                "a forward at stage 3 while another thread is in a forward, a backward or a step: "
                "ranks gather parameters together, in one order; run them one after the other"
            )

    def bring(self) -> None:
        """A backward begins, and where it reduces gradients, their pass has begun."""
        self.needs.bring()

    def watching(self, loss: torch.Tensor) -> AbstractContextManager[None]:
        """Within, a backward from `loss` runs, in the pass that is open."""
        return self._net.under(loss.grad_fn, looks=not self.gatherer.listed)

    @undisturbed
    def close(self, *, complete: bool = True) -> None:
        """The pass is over, `complete` or broken off; nothing where none is open."""
        if not self.is_open:
            return
        self.is_open, self.opener, self._thread, self.needs.at = False, None, 0, -1
        if not complete:
            self._net.doubts = True
        if self.gatherer.in_use:
            self.hooks.settle()
        self._course.close(complete=complete)
        self.strays.say(self.gatherer.strays())
        # where something else is raised, the vote tells of writes, or the next pass does
        written = self._executor.units.changes.take() if complete else None
        if written is not None:
            raise StepError(lost(written))

    # Where all ranks meet.

    @undisturbed
    def meet(self, call: str = "step()", detail: int = 0, *, serving: bool = False) -> None:
        """Before something that all ranks do together, outside passes. Sums have been launched when
        it returns, and may be waited for.

        Raises `Diverged` where another rank does something else.
        """
        if call == "step()" and self._met is not None:
            return
        self._refuse(call)
        self._refuse_other_threads()
        self._thread = threading.get_ident()
        try:
            reading = self._met_at([code_of(call), detail], serving=serving)
        finally:
            self._thread = 0
        # behind another call the next forward learns
        self._met = reading.news if call == "step()" else None

    def _met_at(self, own: Sequence[int], *, serving: bool) -> _core.Reading:
        while True:
            self.gatherer.open("serve" if serving else "boundary")
            reading = self._rolls.decided(own)
            if not serving or reading.kind in ("boundary", "serve"):
                break
            self._stand_in(reading)
        self._rolls.compare(reading)
        self._executor.enqueue(self.gatherer.begin())
        self._executor.reach()
        return reading

    def crossed(self) -> None:
        """The step that all ranks met for is over, or there is none."""
        news, self._met = self._met, None
        if news:
            self._rolls.take_news()

    @undisturbed
    def stand_in(self, *, failed: bool = True) -> str:
        """After a failure, or out of data, takes part in what the peers do until their backward has
        been opened here, or they are elsewhere; returns where they are.
        """
        if failed:
            self.gatherer.fail()
        while True:
            self.gatherer.open("serve")
            reading = self._rolls.decided()
            if reading.kind in ("boundary", "serve"):
                self._rolls.compare(reading)
                self._executor.enqueue(self.gatherer.begin())
                self._met = reading.news
                return reading.kind
            if reading.kind in ("backward", "local_backward"):
                self._executor.enqueue(self.gatherer.begin())
                self._executor.drain()
                self._course.index = reading.list if reading.kind == "backward" else None
                self.is_open = True
                return "backward" if _owes(reading) else reading.kind
            self._stand_in(reading)

    def _stand_in(self, reading: _core.Reading) -> None:
        """Runs a pass of the peers' without computing anything."""
        self._executor.enqueue(self.gatherer.begin())
        if _owes(reading):
            self._executor.drain()
            self._course.index = reading.list if reading.kind == "backward" else None
            self._course.begin()
            self._course.finish()
        else:
            self._course.close(complete=False)

    @undisturbed
    def abandon(self) -> None:
        """The window is lost on all ranks: nothing of it is kept."""
        self.is_open, self.opener, self._met = False, None, None
        self._executor.units.changes.forget()
        self._thread, self.needs.at = 0, -1
        self.hooks.settle()
        self._course.abandon()
        self._executor.forget()
        self._executor.enqueue(self.gatherer.abandon())
        self._executor.reach()
        self.owner.dropped()


def _owes(reading: _core.Reading) -> bool:
    """Whether sums of the pass's gradients are reduced, in it or behind it."""
    return reading.kind == "backward" or any(
        own[0] for kind, _, own in reading.rows if kind == reading.kind == "local_backward"
    )
