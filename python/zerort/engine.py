"""The engine: DeepSpeed's calls over one path of a gradient.

A facade, flat and thin: what a call means stands here, how it is done stands in `step.transaction`
(a micro-batch, whose backward it is, what happens when it fails), `step.boundary` (the vote and the
update) and `step.progress` (what follows it). Calls that belong together beside a step are mixed
in: `checkpoint.calls` (what is saved and loaded), `step.states`, `step.compiling` and `step.gated`.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from zerort.checkpoint.calls import Saving
from zerort.checkpoint.checkpoints import Checkpoints, SavePolicy
from zerort.checkpoint.state import EngineState
from zerort.errors import CheckpointError, StepError
from zerort.features import Site, open_features
from zerort.features.readings import FeatureReadings
from zerort.optim import NoOptimizer
from zerort.start.loader import Request, TrainingLoader, further_loader
from zerort.step.accumulation import Accumulation, Counters, UnusedParameters
from zerort.step.averaging import Averaging
from zerort.step.compiling import Compiling
from zerort.step.events import Events
from zerort.step.forwards import ForwardOnly
from zerort.step.gated import Gated
from zerort.step.getters import Getters
from zerort.step.outside import Outside
from zerort.step.participation import Participation
from zerort.step.progress import Progress
from zerort.step.readings import Components, Readings
from zerort.step.states import MovableStates, States
from zerort.step.transaction import Transaction
from zerort.tune.calls import observing
from zerort.utils.held import Owner

__all__ = ["Engine"]

_log = logging.getLogger("zerort")


class Engine(
    Readings, Getters, FeatureReadings, Saving, MovableStates, Compiling, Gated, nn.Module
):
    """Made by `zerort.initialize`. Its only child is `module`, so its state dict has keys
    `module.*`; unknown attributes are looked up there.
    """

    def __init__(self, module: nn.Module, parts: Components) -> None:
        super().__init__()
        self.module = module
        self.counters = Counters()
        self._parts = parts
        self._events = open_features(Site(module, parts, self.counters))
        self._transaction = _transaction(parts, self.counters, self._events)
        self._states = States(self._transaction, parts)
        self._owner = Owner(self._transaction, parts)
        outside = Outside(self._transaction, parts)
        self._checkpoints = Checkpoints(_state(self), _policy(parts), parts.sink)
        background = self._checkpoints.background
        background.part = parts.mesh.part
        parts.boundary.has_unsaved = background.failed
        # An engine that is dropped without `destroy` leaves no hook on the model.
        self._give_back = weakref.finalize(
            self,
            _give_back,
            self._transaction,
            self._owner.close,
            outside.close,
            self._events.close,
        )
        self._give_back.atexit = False
        self._end_trace = weakref.finalize(self, parts.sink.close)
        self._end_trace.atexit = False

    # One step, in the order of a training loop.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self._transaction.forward(lambda: self._run(args, kwargs))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = self._parts
        args, kwargs = parts.precision.inputs((args, self._events.keywords(kwargs)))
        context = parts.precision.context(self.module, parts.mesh.device, args, kwargs)
        with self._events.forward(), parts.sink.range("forward"), context:
            outputs = self.module(*args, **kwargs)
        return parts.precision.outputs(outputs)

    def scale(self, loss: Tensor, scale_wrt_gas: bool = True) -> Tensor:
        """`loss` over the accumulation steps, times the loss scale, for a `loss.backward()` of the
        user's own.
        """
        return self._transaction.scale(loss, divides=scale_wrt_gas)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Backward of a one-element loss; where this micro-batch's gradients are reduced, they are
        meanwhile.

        Returns the loss divided by the accumulation steps, without the loss scale. Raises
        `StepError` for a loss that is no scalar or has no graph, and whatever the backward raises;
        the other ranks raise at their boundary.
        """
        with self._parts.sink.range("backward"):
            self._transaction.backward(loss, divides=scale_wrt_gas, retain_graph=retain_graph)
        return loss.detach() / (self.gradient_accumulation_steps() if scale_wrt_gas else 1)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Ends the micro-batch; at the boundary votes, updates and publishes the parameters, and
        steps the scheduler with `lr_kwargs`.

        Raises `StepError` within `no_sync` or `torch.inference_mode`, without a backward, when
        another rank has failed, and when something of the user's own raises after the update, which
        then stands; `CheckpointError` where an asynchronous save has failed, and the step stands.
        """
        if self._transaction.part.accumulation.held:
            raise StepError(
                "It is illegal to call Engine.step() inside no_sync context manager and inside "
                "coalesce_grad_reduction(): leave the context first, gradients have not been "
                "reduced"
            )
        with self._parts.sink.range("step"):
            self._transaction.step(lr_kwargs or {})
        boundary = self._parts.boundary
        unsaved, boundary.unsaved = boundary.unsaved, ()
        self._checkpoints.stepped(unsaved)

    # Control.

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Overrides the boundary, for this and all later micro-batches. Raises `StepError` where
        the configuration leaves windows to the caller.
        """
        self._transaction.set_boundary(is_boundary)

    def no_sync(self) -> AbstractContextManager[None]:
        """Within, backwards add into `.grad` and nothing is reduced; the next backward outside
        takes it along.
        """
        return self._transaction.part.accumulation.hold()

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        """Within, backwards add up on this rank; at its end they are reduced in one pass, where
        this micro-batch's gradients are to be reduced at all. `step` comes behind it.

        All ranks enter it. Without a backward in this micro-batch nothing is reduced. What leaves
        it by an exception fails the micro-batch on all ranks, as one in a backward does. Raises
        `StepError` within `no_sync`.
        """
        return self._transaction.coalesce()

    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """Reduces now what has not been: backwards within `no_sync`. All ranks call it.

        Nothing is left to do after a backward that was reduced, nor off the boundary where the
        stage reduces at it. `bucket_size` is DeepSpeed's, and has no effect: buckets are planned.
        Raises `StepError` within `no_sync`.
        """
        self._transaction.reduce()

    def join(
        self,
        divide_by_initial_world_size: bool = False,
        throw_on_early_termination: bool = False,
    ) -> AbstractContextManager[None]:
        """Within, ranks may run out of data at different micro-batches. All ranks enter it.

        A rank that leaves the context completes the steps of the others on zeros, its counters and
        its scheduler included, until all have left; what their last windows hold is then a step
        too. A step's gradient is the mean over the micro-batches that were given, or, with
        `divide_by_initial_world_size`, over those of full windows on all ranks. With
        `throw_on_early_termination` all ranks raise `StepError` as soon as one is out of data
        before the others. An exception that leaves the context is raised as `StepError` on the
        other ranks. Saving and loading have to wait for its end. Mirrors DDP's `join`.
        """
        return self._transaction.join(
            by_initial_world=divide_by_initial_world_size, throws=throw_on_early_termination
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops everything accumulated since the last step, whether it has been reduced or not."""
        self._transaction.drop()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the accumulation steps to fit, for the windows to come.

        Raises `ConfigError` where the batch sizes do not divide, and `StepError` in the middle of a
        window.
        """
        self._transaction.resize(self._batch.with_train(train_batch_size))

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the micro-batch and with it the train batch; the accumulation steps stay."""
        self._transaction.resize(self._batch.with_micro(micro_batch_size))

    def destroy(self) -> None:
        """Writes the trace, takes the hooks off the model and gives the process groups back.

        All ranks call it: what a backward without a `step` has begun is ended together, and then a
        save beside training waited for. The module can be used on, also by `forward`; nothing else
        can. While an exception is handled, ranks that still wait for this one hear of it. A second
        call does nothing. Raises `CheckpointError`, when all is given back, where an asynchronous
        save has failed that has not been raised yet; while an exception is handled that is logged.
        """
        if not self._transaction.closed:
            error = sys.exc_info()[1]
            together = self._transaction.finish(error)
            self._give_back()
            self._parts.mesh.close(waits=together)
            # behind all that peers wait for: writing may take longer than their patience
            try:
                unsaved = self._checkpoints.close()
            finally:
                self._end_trace()
            if unsaved is not None and error is None:
                raise CheckpointError(f"an asynchronous save has failed: {unsaved}")
            if unsaved is not None:
                _log.error("an asynchronous save has failed: %s", unsaved)

    # Data.

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> TrainingLoader | DataLoader[Any]:
        """A loader over `dataset`, of which each rank sees its own part, in batches of `batch_size`
        (the micro-batch when left out). By the route "eval" or "predict" its order is the
        dataset's.

        With a `data_sampler` it is torch's DataLoader over it, and who sees what is the sampler's
        affair. Checkpoints hold no place in it. Raises `ConfigError` for what is no dataset.
        """
        request = Request(
            dataset,
            self.train_micro_batch_size_per_gpu() if batch_size is None else batch_size,
            route,
            pin_memory,
            data_sampler,
            collate_fn or self._parts.collate_fn,
            num_local_io_workers,
        )
        return further_loader(request, self._parts.mesh.job, self._parts.config)

    def tune(self, steps: int = 20, config: str | None = None) -> None:
        """Observes the next `steps` steps, behind six to warm up, measures the wire, and logs on
        rank 0 what a step is predicted to take and has taken, and the setting of buckets and window
        with which it is predicted to be fastest. All ranks call it, between two steps; nothing of
        this run is changed. With the path of its `config` the changed one is written beside that.

        Raises `ConfigError` for fewer than one step, where the changed file cannot be written, and
        on an accelerator and at stage 3, which are not observed.
        """
        self._events.add(observing(self._parts, steps, config))

    def empty_partition_cache(self) -> None:
        """Nothing: at stage 3 no parameter is kept whole behind a step, below it all are."""

    # As an object.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
        try:
            return getattr(self.module, name)
        except AttributeError as error:
            kind = type(self.module).__name__
            raise AttributeError(
                f"neither the engine nor its module {kind} has {name!r}: {error}",
                name=name,
                obj=self,
            ) from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StepError(
            "an engine cannot be copied or pickled, it holds process groups and memory of this "
            "process: copy engine.module, or save engine.module.state_dict() or "
            "engine.save_checkpoint(...)"
        )


def _transaction(parts: Components, counters: Counters, events: Events) -> Transaction:
    config, mesh = parts.config, parts.mesh
    every = config.reduces_every_micro_batch(parts.reduction.plan.reduces_every_micro_batch)
    progress = Progress(counters, parts.boundary, parts.scheduler, events)
    averaging = Averaging(
        Accumulation(
            parts.batch.accumulation,
            every,
            counters,
            managed=config.managed_gradient_accumulation,
        ),
        parts.precision.loss_scale,
        parts.batch,
        ranks=mesh.world if config.gradient_allreduce_op == "mean" else 1,
    )
    unused = UnusedParameters(mesh.rank, config.unused_parameters)
    part = Participation(averaging, parts.reduction, parts.boundary, progress, unused, parts.passes)
    update = parts.boundary.optimizer
    return (
        ForwardOnly(part, update.reason) if isinstance(update, NoOptimizer) else Transaction(part)
    )


def _policy(parts: Components) -> SavePolicy:
    settings = parts.config
    return SavePolicy(
        settings.checkpoint.tag_validation,
        settings.zerort.checkpoint.timeout,
        settings.zerort.checkpoint.asynchronous,
        timedelta(seconds=settings.zerort.timeout),
    )


def _state(engine: Engine) -> EngineState:
    parts = engine._parts
    boundary = parts.boundary
    return EngineState(
        engine.module,
        parts.mesh.shard,
        parts.mesh.replica,
        boundary.flat,
        parts.reduction,
        boundary.exchange,
        boundary.optimizer,
        boundary.loss_scale,
        engine._transaction.part.progress,
        parts.config.zero_optimization.stage,
        parts.loader,
        parts.config.zerort.wire_error_feedback == "checkpoint",
        lambda reason: setattr(boundary, "half_updated", reason),
        lambda: boundary.half_updated,
    )


def _give_back(transaction: Transaction, *closes: Callable[[], None]) -> None:
    """Must not hold the engine: it runs when that is collected, or destroyed. One that raises takes
    nothing from the others.
    """
    with ExitStack() as stack:
        for close in reversed(closes):
            stack.callback(close)
        stack.callback(transaction.close)
