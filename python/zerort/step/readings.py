"""What there is to read of an engine, under DeepSpeed's names. Nothing here changes anything, and
nothing is kept here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from zerort import _core
from zerort.config import Batch, Config
from zerort.errors import StepError
from zerort.grads.reduction import Reduction
from zerort.memory import Layout, PlannedParameter
from zerort.mesh import Mesh
from zerort.params.passes import Passes, Resident
from zerort.step.accumulation import Counters
from zerort.step.boundary import Boundary
from zerort.step.precision import Precision
from zerort.step.transaction import Transaction
from zerort.trace import TraceSink
from zerort.trace.breakdown import RangeTimes
from zerort.trace.communication import CommunicationWatch
from zerort.wire import format_of

__all__ = ["Components", "Readings", "momentum"]


@dataclass(frozen=True)
class Relocation:
    """What it takes to give a model other buckets."""

    members: Sequence[PlannedParameter]
    """The parameters, by id."""
    plan_of: Callable[[Config, int | None], _core.Plan]
    """Their plan by a configuration, gradients sent in the wire format of this number, or in the
    one that was chosen for each. Raises `ConfigError`.
    """
    layout_of: Callable[[_core.Plan], Layout]
    """Where memory lies by a plan."""


@dataclass(frozen=True)
class Components:
    """What an engine is assembled from."""

    config: Config
    mesh: Mesh
    batch: Batch
    precision: Precision
    reduction: Reduction
    boundary: Boundary
    scheduler: Any
    sink: TraceSink
    loader: Any = None
    """The training loader that `initialize` made, or None."""
    collate_fn: Callable[[Any], Any] | None = None
    """What `initialize` was given to make batches of samples."""
    passes: Passes | Resident = field(default_factory=Resident)
    """What gathers sharded parameters."""
    times: RangeTimes | None = None
    """Where the sink's ranges are timed."""
    communication: CommunicationWatch | None = None
    """What is told of each collective, where a summary is wanted."""
    relocation: Relocation | None = None


class Readings:
    """Getters over what the engine is made of."""

    counters: Counters
    _parts: Components
    _transaction: Transaction

    @property
    def optimizer(self) -> Optimizer | None:
        """The torch optimizer, over this rank's shards; None for an engine that only runs forward.
        It cannot be assigned: `StepError`.
        """
        return self._parts.boundary.optimizer.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: object) -> None:
        raise StepError(
            "engine.optimizer cannot be assigned: its tensors are this engine's shards. Change "
            "the numbers of its param_groups, or make a new engine by "
            "zerort.initialize(optimizer=...) over a model built anew"
        )

    @property
    def lr_scheduler(self) -> Any:
        """The learning rate scheduler, or None. What is assigned is stepped, saved and loaded from
        then on; None takes it away. Raises `ConfigError` for what has no `step`.
        """
        return self._transaction.part.progress.scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self._transaction.part.progress.follow(scheduler)

    @property
    def communication_data_type(self) -> torch.dtype | None:
        """Element type in which gradients are sent; None where not all are sent in one. Assigning
        another raises `StepError`: buffers are planned for this one.
        """
        sent = {format_of(bucket.spec.wire).dtype for bucket in self._parts.boundary.flat.trained}
        return sent.pop() if len(sent) == 1 else None

    @communication_data_type.setter
    def communication_data_type(self, dtype: torch.dtype) -> None:
        if dtype != self.communication_data_type:
            raise StepError(
                f"engine.communication_data_type cannot be assigned {dtype}: buffers are planned "
                f"for {self.communication_data_type}; give communication_data_type in the "
                "configuration"
            )

    @property
    def training_dataloader(self) -> Any:
        """The loader that `initialize` made of training_data, or None."""
        return self._parts.loader

    @property
    def config(self) -> Config:
        """The configuration: by attributes what holds, typed; by keys, as a mapping, what was
        given.
        """
        return self._parts.config

    @property
    def device(self) -> torch.device:
        """Where the module lives."""
        return self._parts.mesh.device

    # Places.

    @property
    def local_rank(self) -> int:
        """This rank's number on its host: torchrun's `LOCAL_RANK`, else its device's index, else
        0.
        """
        return int(os.environ.get("LOCAL_RANK") or self.device.index or 0)

    @property
    def global_rank(self) -> int:
        """This rank's number in the job."""
        return self._parts.mesh.rank

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._parts.mesh.world

    @property
    def dp_world_size(self) -> int:
        """Ranks that read different data: all of them."""
        return self._parts.mesh.world

    @property
    def mp_world_size(self) -> int:
        """Ranks that a layer is cut over: 1."""
        return 1

    def get_data_parallel_rank(self) -> int:
        """This rank's number among those that read different data."""
        return self._parts.mesh.rank

    # Counters and numbers of the run.

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by; 1 where there is no loss scale."""
        return self._parts.precision.loss_scale.scale

    @property
    def scales_loss(self) -> bool:
        """Whether a loss has to come through `backward` or `scale`: it is multiplied by the loss
        scale there.
        """
        return self._parts.precision.scales_loss

    @property
    def overflow(self) -> bool:
        """Whether a gradient was not finite at the last boundary, so that its step was skipped."""
        return self._parts.boundary.overflow

    @property
    def global_steps(self) -> int:
        """Boundaries passed, skipped ones included."""
        return self.counters.global_steps

    @property
    def global_samples(self) -> int:
        """Samples of these boundaries, over all ranks."""
        return self.counters.global_samples

    @property
    def micro_steps(self) -> int:
        """Micro-batches ended by `step`."""
        return self.counters.micro_steps

    @property
    def skipped_steps(self) -> int:
        """Boundaries at which a gradient was not finite."""
        return self.counters.skipped_steps

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the parameters."""
        return self._transaction.part.progress.applied

    def get_global_grad_norm(self) -> float | None:
        """Norm of the averaged, unscaled gradient before clipping, at the last boundary; None
        before the first.
        """
        return self._parts.boundary.norm

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [group["lr"] for group in self._parts.boundary.optimizer.groups]

    def get_mom(self) -> list[Any]:
        """Momentum, or betas, of each parameter group."""
        return [momentum(group) for group in self._parts.boundary.optimizer.groups]

    @property
    def exposed_communication(self) -> float:
        """Seconds that the host stood still for collectives between the last two steps.

        nan on an accelerator, which alone knows how long it stood still: see the trace.
        """
        return self._parts.boundary.exposed

    @property
    def _batch(self) -> Batch:
        """As of the window under way."""
        return self._transaction.part.averaging.batch

    def train_batch_size(self) -> int:
        """Samples of one step, over all ranks."""
        return self._batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one backward on one rank."""
        return self._batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one step."""
        return self._batch.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """The three above, in this order."""
        batch = self._batch
        return batch.train, batch.micro, batch.accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last of its accumulation window."""
        return self._transaction.part.accumulation.boundary


def momentum(group: Mapping[str, Any]) -> Any:
    """An optimizer group's betas, or its momentum."""
    return group["betas"] if "betas" in group else group.get("momentum", 0.0)
