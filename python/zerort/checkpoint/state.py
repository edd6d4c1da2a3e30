"""What an engine's state is, for saving and loading alike: the parts that hold it, and how they are
found.

Three kinds. *Planned*: masters and optimizer state, in shards, cut along the plan; of what no
optimizer has, the values. *Loose*: buffers, and parameters outside the plan; every rank has them
whole, and rank 0's are the ones that count. *Small*: counters, schedules, options, a rank's own
random numbers; values rather than tensors, encoded into the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zerort import _core
from zerort.memory import FlatModel, Kept
from zerort.mesh import Comm
from zerort.optim import Update
from zerort.optim.segments import Segment
from zerort.step.accumulation import Counters
from zerort.step.events import Events
from zerort.step.precision import LossScale
from zerort.step.progress import Progress
from zerort.wire import WireState

__all__ = [
    "EngineState",
    "aliases",
    "by_bucket",
    "extra_states",
    "loose",
    "own_shard",
    "scheduler_name",
    "strides_of",
]


class Exchanged(Protocol):
    """What is used of what brings parameters to masters on other ranks, and back."""

    def take_writes(self) -> None:
        """The masters follow what has been written outside a step."""

    def values(self) -> None:
        """The parameters follow the masters."""


class Encoded(Protocol):
    """What is used of what a rank alone has of gradients."""

    def wire_state(self) -> WireState:
        """What encoders of gradients have kept."""


class Reduced(Protocol):
    """What is used of what brings gradients into shards, and shards to all ranks."""

    plan: _core.Plan

    @property
    def local(self) -> Encoded:
        """What this rank alone has."""

    def publish(self) -> None:
        """Brings every rank's shard to all ranks."""


@dataclass(frozen=True)
class EngineState:
    """The parts of an engine that a checkpoint holds. `loader` is the training loader, or None.

    `comm` are the ranks that hold one copy of the model state, in the order of their shards, and
    `copies` those that hold the same shard of each copy.
    """

    module: nn.Module
    comm: Comm
    copies: Comm
    flat: FlatModel
    reduction: Reduced
    exchange: Exchanged
    optimizer: Update
    loss_scale: LossScale
    progress: Progress
    stage: int
    loader: Any = None
    keeps_feedback: bool = False
    """Whether what the wire has rounded off is saved."""
    broke_off: Callable[[str], None] = lambda reason: None
    """Takes the reason when a load has left the engine half changed: no step may be applied before
    another load.
    """
    half_changed: Callable[[], str | None] = lambda: None
    """How an update or a load broke off on this rank, if the last one did."""

    @property
    def scheduler(self) -> Any:
        """The learning rate scheduler that is stepped now, or None."""
        return self.progress.scheduler

    @property
    def counters(self) -> Counters:
        """The engine's counters."""
        return self.progress.counters

    @property
    def events(self) -> Events:
        """Features, some of which have state."""
        return self.progress.events

    @property
    def plan(self) -> _core.Plan:
        """The layout of gradients and values; its launch order may change with time."""
        return self.reduction.plan

    @property
    def layout(self) -> _core.Plan:
        """That of masters and the optimizer's state."""
        return self.flat.layout

    def take_writes(self) -> None:
        """The masters follow what has been written outside a step; all ranks call it."""
        self.flat.take_writes()
        self.exchange.take_writes()


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides as the tensor lies in its bucket; 0 for dimensions of one element, whose stride means
    nothing.
    """
    dense = torch.empty_like(tensor, device="meta").stride()
    return tuple(
        stride if size > 1 else 0 for size, stride in zip(tensor.shape, dense, strict=True)
    )


def own_shard(bucket: Kept, owned: Tensor, rank: int) -> Tensor:
    """This rank's shard of a tensor that lies as the bucket's owned part does; a room may be
    shorter.
    """
    start = rank * bucket.spec.shard_numel - bucket.start
    return owned.narrow(0, start, min(bucket.spec.shard_numel, owned.numel() - start))


def by_bucket(optimizer: Update) -> dict[int, list[Segment]]:
    """The optimizer's segments by the identity of their bucket, in their order."""
    found: dict[int, list[Segment]] = {}
    for segment in optimizer.segments:
        found.setdefault(id(segment.bucket), []).append(segment)
    return found


def loose(module: nn.Module, flat: FlatModel) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the module's state that no bucket holds: `buffer.NAME` and `param.NAME`, each
    once.
    """
    planned = {id(parameter) for parameter in flat.params}
    for name, parameter in module.named_parameters():
        if id(parameter) not in planned:
            yield f"param.{name}", parameter
    passing = {
        f"{prefix}{'.' if prefix else ''}{name}"
        for prefix, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    }
    for name, buffer in module.named_buffers():
        if name not in passing:
            yield f"buffer.{name}", buffer


def aliases(module: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers that have several, and the first name of each."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if first.setdefault(id(tensor), name) != name:
                found[name] = first[id(tensor)]
    return found


def extra_states(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a `get_extra_state` of their own, by name."""
    for name, child in module.named_modules():
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            yield name, child


def scheduler_name(scheduler: Any) -> str | None:
    """The class of a learning-rate scheduler, with those of the schedulers in it."""
    if scheduler is None:
        return None
    name = type(scheduler).__qualname__
    inner = getattr(scheduler, "_schedulers", None)  # torch's SequentialLR and ChainedScheduler
    if not isinstance(inner, (list, tuple)):
        return name
    return f"{name}({', '.join(str(scheduler_name(one)) for one in inner)})"
