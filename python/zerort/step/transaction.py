"""A micro-batch as a transaction: what this rank's engine is in the middle of.

    Idle ── backward ──> Backward ── over ──> Idle                 its gradients count
      │                     └────── raises ──> Settled ── step ──> Idle      the step is void
      └── a hook: a backward of another's is here ──> Reached ── over ──> Idle
                              its first gradient ──> Backward

A failure is carried through (`step.settling`): the peers raise with its reason, and the next
micro-batch starts clean on all. A backward that this engine has not begun is followed by
`step.direct`; one whose gradients wait is reduced by `step.deferred`; what ranks come to together
beside their micro-batches stands in `step.joint`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from zerort.config import Batch
from zerort.errors import CommError, StepError
from zerort.grads.compiled import Around, shield
from zerort.grads.hooks import when_backward_reaches
from zerort.grads.tasks import announce, in_backward
from zerort.params.passes import Refusal
from zerort.params.roll import Diverged
from zerort.step.join import JoinEnded
from zerort.step.joint import JointCalls
from zerort.step.loss import refuse_unfit, scaled
from zerort.step.participation import Participation
from zerort.step.phases import Away, Backward, Destroyed, Idle, Lost, Settled, between
from zerort.step.settling import AWAY
from zerort.wire import WireState

__all__ = ["Transaction"]

_log = logging.getLogger("zerort")

T = TypeVar("T")


class Transaction(JointCalls):
    """The calls of a training loop, and a backward's way through its phases."""

    def __init__(self, part: Participation) -> None:
        super().__init__(part)
        self._around: Around = nullcontext
        self._forwards = 0
        """That run."""

    # The calls of a training loop.

    def forward(self, run: Callable[[], T]) -> T:
        """A forward. One that raises is the caller's own affair, unless parameters were gathered
        for it: then it fails its micro-batch.

        Returns what `run` does, and hears of every backward that comes to it.
        """
        if isinstance(self._phase, Away) and (self._phase.values or torch.is_grad_enabled()):
            self.refuse_away("forward()")
        if torch.is_grad_enabled() and self._raised():
            self._settle("a direct loss.backward() raised", owes=True)
        self._forwards += 1
        try:
            outputs = self._computed(run)
        except CommError:
            self._hear_of_lost_updates()
            raise
        finally:
            self._forwards -= 1
        when_backward_reaches(outputs, self._begins)
        return outputs

    def _computed(self, run: Callable[[], T]) -> T:
        passes = self.part.passes
        if not torch.is_grad_enabled():
            # kernels for parameters of the plain class alone
            self._reduction.land()
        if not passes.shards or passes.is_within(in_backward=in_backward()):
            return run()
        trains = passes.trains and torch.is_grad_enabled()
        try:
            with self._parting():
                return self.part.compute(run, trains=trains)
        except Diverged:
            self._abandon()
            raise
        except BaseException as error:
            if trains and not isinstance(error, CommError):
                # the peers, whose forwards went through, go on to a backward
                self._settle(f"{type(error).__name__}: {error}", owes=True)
                if self.part.accumulation.ends_on_failure:
                    self._rest_at(Settled())
            raise

    def scale(self, loss: Tensor, *, divides: bool) -> Tensor:
        """The scaled loss, for a `backward()` of the user's own that is then known as such.

        It `divides` by the accumulation steps unless asked not to.
        """
        refuse_unfit(loss)
        scaling = self.part.averaging.scaling(divides=divides)
        given, loss = loss.detach(), scaled(loss, scaling)
        announce(loss, self, scaling, by_call=False, given=given)
        # it need not come from a forward of the engine's
        when_backward_reaches(loss, self._begins)
        return loss

    def backward(self, loss: Tensor, *, divides: bool, retain_graph: bool) -> None:
        """The backward of a scalar loss. Raises what it raises, once the peers have its reason."""
        scaling = self.part.averaging.scaling(divides=divides)
        self._demand("backward()")
        before = between(self._phase)
        with self._settling(Settled()):
            self._phase = Backward(before)
            refuse_unfit(loss)
            retain_graph |= self.part.events.backward(loss, scaling.steps or 1)
            if before.resting is not None:
                self.part.keep(before.resting)
            self.part.reach(announced=True)
            self._open(scaling)
            loss = scaled(loss, scaling)
            handle = announce(loss, self, scaling, by_call=True, compiles=self._compiles)
            try:
                with self.part.passes.watching(loss), self._around():
                    loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            finally:
                handle.remove()
            self._close()

    def compile_backwards(self, around: Around) -> None:
        """From now on `backward` runs in `around`, and no hook is traced in it."""
        self._demand("compile()")
        if not self._compiles:
            self._listener.shield()
            self.part.passes.shield()
            self._around, self._begins = around, shield(self.reached)

    @property
    def _compiles(self) -> bool:
        return self._around is not nullcontext

    def step(self, arguments: Mapping[str, Any]) -> None:
        """Ends the micro-batch, at the boundary with the vote and the update."""
        with self.part.accumulation.step():
            self._step(arguments)

    def _step(self, arguments: Mapping[str, Any]) -> None:
        self.part.progress.applied = False
        if isinstance(self._phase, Settled):
            self._phase = Idle()
            return
        self._demand("step()", recovering=False)
        self._refuse_pinned("step()")
        with self._settling(Idle()):
            self._check_step(arguments)
        try:
            if self.part.accumulation.boundary:
                with self._parting():
                    self.part.step(arguments)
        except (JoinEnded, Diverged):
            self._abandon()
            raise
        except BaseException:
            self._advance()
            raise
        self._advance()

    def set_boundary(self, is_boundary: bool) -> None:
        """Overrides the boundary from this micro-batch on."""
        self._refuse_unmanaged("set_gradient_accumulation_boundary()")
        self.part.accumulation.override = is_boundary

    def drop(self) -> None:
        """Forgets all gradients since the last step. Raises `StepError` within a backward."""
        self._demand("zero_grad()", recovering=False)
        with self._parting():
            self.part.drop()

    def resize(self, batch: Batch) -> None:
        """Windows to come have other sizes. Raises `StepError` in the middle of one."""
        self._demand("a change of the batch", recovering=False)
        self.part.averaging.resize(batch, backwards=between(self._phase).backwards)

    def depart(self, *, values: bool) -> None:
        """States go to the host, parameters among them if it is `values`: until `arrive` nothing
        can be done with them. Raises `StepError` where this is not between two steps.
        """
        if isinstance(self._phase, Away):
            self._phase = Away(values or self._phase.values)
        else:
            self.check_departure()
            self._phase = Away(values)
        passes = self.part.passes
        passes.refusal = Refusal(AWAY, evaluates=not self._phase.values)

    def check_departure(self) -> None:
        """Raises `StepError` where this is not between two steps."""
        call = "offload_states()"
        if isinstance(self._phase, Away):
            return
        self._demand(call)
        accumulation, passes = self.part.accumulation, self.part.passes
        if self.part.joined or accumulation.held or passes.pinned:
            raise StepError(
                f"{call} inside join(), no_sync(), coalesce_grad_reduction() or "
                "GatheredParameters: leave the context first"
            )
        if self._forwards or passes.is_open:
            raise StepError(f"{call} inside a forward: call it between two steps")
        begun = accumulation.window.taken or between(self._phase).backwards
        if begun or not isinstance(self._phase, Idle) or self._reduction.local.unreduced():
            raise StepError(
                f"{call} in the middle of a window, whose gradients would be lost: call it right "
                "after a step at a boundary"
            )
        with self._parting():
            self._reduction.land()
            self._reduction.drain()

    def arrive(self) -> None:
        """They are back."""
        self.part.passes.refusal = None
        if isinstance(self._phase, Away):
            self._phase = Idle()

    def restart(self, kept: WireState | None = None, growth: float = 1.0) -> None:
        """A checkpoint has been loaded: the window begins anew, with what encoders had `kept` when
        gradients were so much smaller.
        """
        with self._parting():
            self.part.drop()
        self._reduction.local.forget(kept, growth)
        self._phase = Idle()
        self.part.boundary.mend()
        self.part.accumulation.realign()
        self.part.events.restored()

    def close(self) -> None:
        """Takes the hooks off the model; no call but `forward` works afterwards."""
        if not isinstance(self._phase, Destroyed):
            parted = isinstance(self._phase, Lost) or self._reduction.unpublished is not None
            self._phase = Destroyed()
            try:
                self._reduction.end_publication(waits=not parted)
            except CommError as error:
                _log.warning("updated parameters were lost on their way: %s", error)
            self._reduction.close()
            self.part.passes.detach(whole=self.part.boundary.half_updated is None)

    # The end of a micro-batch.

    def _check_step(self, arguments: Mapping[str, Any]) -> None:
        """Raises `StepError` where this micro-batch cannot end with a step."""
        accumulation = self.part.accumulation
        if torch.is_inference_mode_enabled():
            if accumulation.defers and isinstance(self._phase, Idle):
                self._phase = Idle()  # whose pass is still owed
            raise StepError(
                "step() under torch.inference_mode(): what it made could not be trained on; "
                "leave it"
            )
        if not self._has_backwards():
            raise StepError(
                "step() without backward() in this micro-batch: call engine.backward(loss) first"
            )
        if accumulation.defers and not self._reduction.passes:
            self._reduce_waiting()
        if accumulation.boundary:
            self.part.progress.check(arguments)
            self.part.meet()  # what is raised here reaches the vote
