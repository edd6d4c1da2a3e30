"""The engine: DeepSpeed's calls over one path of a gradient.

A facade. What a call means stands here; how it is done stands in `accumulation` (whose gradients
travel), `reduction` (passes), and `boundary` (the vote and the step). A micro-batch is a
transaction: if it fails on this rank, the rank still takes part in every collective its peers wait
for, on zeros and with a poison flag in the vote, and then raises; the peers raise too, with this
rank's reason, and the next micro-batch starts clean on all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zerort.config import Batch
from zerort.errors import CommError, ConfigError, StepError
from zerort.grads.hooks import after_backward, when_backward_reaches
from zerort.readings import Parts
from zerort.saving import Saving
from zerort.start import checks
from zerort.step.accumulation import Accumulation
from zerort.step.boundary import Outcome
from zerort.step.loss import refuse_unfit, scaled
from zerort.step.unused import Absent

__all__ = ["Engine"]

_log = logging.getLogger("zerort")


@dataclass
class MicroBatch:
    """What has happened since the last `step`."""

    backwards: int = 0
    running: bool = False
    """A backward is under way, or a direct one has raised and nothing has told so yet."""
    prepared: bool = False
    """`scale` was called for a `loss.backward()` of the user's own."""
    travelled: bool = False
    """The latest backward's gradients are on their way."""
    failed: bool = False
    """The one before raised in `backward` and has settled with the peers: a `step` that still
    belongs to it is void.
    """


class Engine(Saving):
    """Made by `zerort.initialize`. Its only child is `module`, so its state dict has keys
    `module.*`.
    """

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        super().__init__(module, parts)
        every = parts.config.reduces_every_micro_batch(
            parts.reduction.plan.reduces_every_micro_batch
        )
        self._accumulation = Accumulation(parts.batch.accumulation, every, self.counters)
        self._micro = MicroBatch()
        self._failure: str | None = None
        self._absent = Absent(parts.comm.rank, parts.config.unused_parameters)

    # One step, in the order of a training loop.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        self._recover()
        parts = self._parts
        args, kwargs = parts.precision.inputs((args, kwargs))
        with parts.sink.range("forward"), parts.precision.context(parts.comm.device):
            outputs = self.module(*args, **kwargs)
        when_backward_reaches(outputs, self._reached)
        return outputs

    def scale(self, loss: Tensor, scale_wrt_gas: bool = True) -> Tensor:
        """`loss` over the accumulation steps, times the loss scale, for a `loss.backward()` of the
        user's own.
        """
        refuse_unfit(loss)
        self._micro.prepared = True
        return self._scaled(loss, scale_wrt_gas)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Backward of a one-element loss; where this micro-batch's gradients travel, they do so
        meanwhile.

        Returns the loss divided by the accumulation steps, without the loss scale. Raises
        `StepError` for a loss that is no scalar or has no graph, and whatever the backward raises;
        the other ranks raise at their boundary.
        """
        self._recover()
        with self._transaction(step_follows=True), self._parts.sink.range("backward"):
            refuse_unfit(loss)
            if self._micro.prepared:
                raise StepError(
                    "engine.scale(loss) is for a loss.backward() of your own, and its loss would "
                    "be scaled twice: call backward() on what scale returned, or give "
                    "engine.backward the loss as it is"
                )
            self._open(direct=False)
            self._scaled(loss, scale_wrt_gas).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            self._close()
        return loss.detach() / (self._accumulation.steps if scale_wrt_gas else 1)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Ends the micro-batch; at the boundary votes, and updates and publishes the parameters.

        Raises `StepError` within `no_sync` or `torch.inference_mode`, without a backward, and when
        another rank has failed.
        """
        if self._accumulation.held:
            raise StepError(
                "step() inside no_sync(): leave the context first, gradients have not been reduced"
            )
        if self._micro.failed:
            self._micro = MicroBatch()
            return
        with self._transaction(step_follows=False):
            if self._interrupted():
                raise StepError(
                    "a direct loss.backward() raised in this micro-batch; its gradients are dropped"
                )
            if not self._micro.backwards:
                raise StepError(
                    "step() without backward() in this micro-batch: call engine.backward(loss) "
                    "first"
                )
            if torch.is_inference_mode_enabled():
                raise StepError(
                    "step() under torch.inference_mode(): what it made could not be trained on; "
                    "leave it"
                )
            if self._accumulation.boundary:
                self._parts.reduction.drain()  # what is raised here reaches the vote
        try:
            self._applied = False
            if self._accumulation.boundary:
                self._cross(lr_kwargs or {})
        finally:
            self._advance()

    # The transaction.

    @contextmanager
    def _transaction(self, *, step_follows: bool) -> Iterator[None]:
        self._micro.failed = False
        if step_follows:
            self._micro.travelled = False
        try:
            yield
        except CommError:
            raise  # there is nobody left to keep in step with
        except BaseException as error:
            self._settle(f"{type(error).__name__}: {error}")
            self._micro.failed = step_follows
            raise

    def _settle(self, failure: str) -> None:
        """After a failure: takes part in what is left of the micro-batch on zeros, at the boundary
        also in the vote.
        """
        self._failure = self._failure or failure
        travels = self._accumulation.travels and not self._micro.travelled
        self._parts.reduction.abort(self._fold(), travels=travels)
        try:
            if self._accumulation.boundary:
                self._parts.boundary.cross(self._fold(), self._failure)
        except StepError:
            pass  # the verdict on our own failure, which the caller sees at first hand
        finally:
            self._advance()

    def _recover(self) -> None:
        """Settles for a backward of the user's own that has raised: nothing else tells of it."""
        if self._interrupted():
            self._settle("a direct loss.backward() raised")

    def _interrupted(self) -> bool:
        """Whether a direct backward has brought gradients and not ended."""
        return self._parts.reduction.disarm() or self._micro.running

    def _reached(self) -> None:
        """A backward has come to the module's outputs; if it is not ours, it may be one that
        accumulates or not.
        """
        if not self._micro.running and self._parts.reduction.arm(self._announced):
            after_backward(self._ended)

    def _announced(self) -> None:
        """A gradient has come in a backward of the user's own."""
        if not self._micro.prepared and self._parts.precision.loss_scale.scale != 1.0:
            self._micro.running = (
                True  # what has come is unscaled, and dropped when the failure is settled
            )
            raise StepError(
                "a direct loss.backward() would not be loss-scaled: use engine.backward(loss), or "
                "engine.scale(loss).backward(); where another engine's backward comes through "
                "this module, freeze it meanwhile with requires_grad_(False)"
            )
        self._open(direct=not self._micro.prepared)

    def _ended(self) -> None:
        """A backward or autograd.grad of the user's own is over."""
        if self._parts.reduction.disarm():
            self._announced()  # it has touched no sentinel
        if self._micro.running:
            self._close()

    def _open(self, *, direct: bool) -> None:
        """A backward begins."""
        self._micro.running = True
        self._accumulation.note(direct=direct)
        self._parts.boundary.optimizer.check()
        if self._parts.reduction.follow():
            self._parts.boundary.optimizer.split()
        if self._accumulation.travels:
            self._parts.reduction.begin(self._fold())

    def _close(self) -> None:
        """A backward is over."""
        reduction = self._parts.reduction
        if reduction.in_pass:
            self._micro.travelled = True  # from here on it cannot be taken back
            absent = reduction.finish()
            self._absent.tell(absent)
        else:
            reduction.collect()
        self._micro.running = self._micro.prepared = False
        self._micro.backwards += 1

    def _cross(self, lr_kwargs: dict[str, Any]) -> None:
        parts = self._parts
        outcome = parts.boundary.cross(self._fold(), self._failure)
        self._applied = outcome is Outcome.APPLIED
        self.counters.global_steps += 1
        self.counters.global_samples += self._batch.train
        if not self._applied:
            self.counters.skipped_steps += 1
        elif parts.scheduler is not None:
            parts.scheduler.step(**lr_kwargs)
        every = parts.config.steps_per_print
        if every and self.counters.global_steps % every == 0 and parts.comm.rank == 0:
            _log.info(
                "step=%d, skipped=%d, lr=%s, mom=%s, norm=%s",
                *(
                    self.global_steps,
                    self.skipped_steps,
                    self.get_lr(),
                    self.get_mom(),
                    self.get_global_grad_norm(),
                ),
            )
        if parts.sink.enabled and self.loss_scale != 1.0:
            parts.sink.counter("loss scale", parts.sink.now(), self.loss_scale)
        parts.sink.step(self.counters.global_steps)

    def _advance(self) -> None:
        if self._accumulation.boundary:
            self._failure = None
        self._accumulation.advance()
        self._micro = MicroBatch()

    def _fold(self) -> float:
        """What sums over ranks are multiplied by."""
        parts = self._parts
        ranks = parts.comm.world if parts.config.gradient_allreduce_op == "mean" else 1
        return 1.0 / (ranks * self._accumulation.divisor)

    def _scaled(self, loss: Tensor, scale_wrt_gas: bool) -> Tensor:
        steps = self._accumulation.steps if scale_wrt_gas else 1
        return scaled(loss, steps=steps, scale=self.loss_scale)

    # Control.

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last of its accumulation window."""
        return self._accumulation.boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Overrides the boundary, for this and all later micro-batches."""
        self._accumulation.override = is_boundary

    def no_sync(self) -> AbstractContextManager[None]:
        """Within, backwards add into `.grad` and nothing travels; the next backward outside takes
        it along.
        """
        return self._accumulation.hold()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops everything accumulated since the last step, whether it has been reduced or not."""
        self._parts.reduction.drain()
        self._parts.reduction.drop()
        self._parts.reduction.reset()
        self._accumulation.forget()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the accumulation steps to fit, for the windows to come.

        Raises `ConfigError` where the batch sizes do not divide, and `StepError` in the middle of a
        window.
        """
        self._resize(
            Batch.resolve(train_batch_size, self._batch.micro, None, self._parts.comm.world)
        )

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the micro-batch and with it the train batch; the accumulation steps stay."""
        self._resize(
            Batch.resolve(None, micro_batch_size, self._batch.accumulation, self._parts.comm.world)
        )

    def _resize(self, batch: Batch) -> None:
        self._accumulation.resize(batch.accumulation, backwards=self._micro.backwards)
        self._batch = batch

    # What `Saving` asks for.

    def _settled(self) -> None:
        """Nothing is under way any more."""
        self._recover()
        self._parts.reduction.drain()

    def _restored(self) -> None:
        """A checkpoint has been loaded: the window begins anew."""
        self.zero_grad()
        self._micro, self._failure, self._parts.boundary.torn = MicroBatch(), None, None
        self._accumulation.realign()

    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compiles the module in place, once; `compile_kwargs` are torch.compile's, and `backend`
        wins over theirs.

        Compiled whole, all gradients come at the end and nothing overlaps: compile the module's
        blocks where that matters. Raises `ConfigError` for a `schedule` (DeepCompile's) and for
        compiled autograd, which are not built.
        """
        if schedule is not None:
            raise ConfigError(
                "compile(schedule=...) is refused: it orders DeepCompile's passes, which are not "
                "built"
            )
        if compiled_autograd_enabled:
            raise ConfigError(
                "compile(compiled_autograd_enabled=True) is refused: it would trace the hook of "
                "every single gradient; leave it out, a compiled module's backward is compiled "
                "anyway"
            )
        if self.is_compiled:
            return
        self.module.compile(**{**(compile_kwargs or {}), "backend": backend})
        if self._parts.comm.rank == 0:
            _log.warning(checks.COMPILED_WHOLE)

    @property
    def is_compiled(self) -> bool:
        """Whether the module is compiled whole, here or before `initialize`."""
        return checks.is_whole(self.module)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StepError(
            "an engine cannot be copied or pickled, it holds process groups and memory of this "
            "process: copy engine.module, or save engine.module.state_dict() or "
            "engine.save_checkpoint(...)"
        )

    def destroy(self) -> None:
        """Writes the trace, takes the hooks off the model and gives the process groups back."""
        self._parts.reduction.close()
        self._parts.sink.close()
        self._parts.comm.close()
