"""The naive twin: what N ranks should have computed, by one process that loops over all of their data.

A `Case` says what is trained: a model, an optimizer, and one function that runs a micro-batch on anything that quacks
like an engine. The `Twin` runs it for every rank and micro-batch in turn with plain autograd, averages the gradients,
and gives them to a plain torch optimizer over whole parameters. It knows no buckets, shards, views, hooks or schedules.

Its arithmetic is that of the contract: a missing gradient is zero, a frozen parameter is untouched, gradients are
clipped by `max(1, (norm + 1e-6) / limit)`, parameters of less than fp32 have fp32 masters. Sums are in fp64, so that a
difference to the twin is the other side's rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

SEED = 20
MICRO_BATCH = 4

ReduceAt = Literal["micro_batch", "boundary"]


@dataclass(frozen=True)
class Moment:
    """One micro-batch of one rank, and the only source of its data."""

    rank: int
    step: int
    micro: int

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers (fp32) that depend on the moment alone."""
        return torch.randn(*shape, generator=self._generator())

    def tokens(self, vocabulary: int, *shape: int) -> Tensor:
        """Token ids (int64) below `vocabulary`."""
        return torch.randint(vocabulary, shape, generator=self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(1 + self.rank + 10 * self.micro + 100 * self.step)


def every_parameter(module: nn.Module) -> list[nn.Parameter]:
    """One optimizer group with all of the model."""
    return list(module.parameters())


def change_nothing(module: nn.Module, step: int) -> None:
    """Leaves the model between steps as it is."""


def sgd(params: Any) -> Optimizer:
    """Plain gradient descent: its weights show the gradient, scale included."""
    return torch.optim.SGD(params, lr=0.5)


@dataclass(frozen=True)
class Case:
    """What is trained. `micro(engine, moment)` runs forward and backward of one micro-batch, without `step`."""

    model: Callable[[], nn.Module]
    micro: Callable[[Any, Moment], None]
    optimizer: Callable[[Any], Optimizer] = sgd
    groups: Callable[[nn.Module], list[Any]] = every_parameter
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    before: Callable[[nn.Module, int], None] = change_nothing
    clip: float = 0.0
    steps: int = 3

    def seeded_model(self) -> nn.Module:
        """The same weights wherever it is called."""
        torch.manual_seed(SEED)
        return self.model()


@dataclass
class History:
    """What a run left behind, one entry a step."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@dataclass(frozen=True)
class Precision:
    """The dtype that parameters are cast to (None: as the model has them), and a fixed loss scale.

    With `gathers_sums` the mean of the ranks' gradients travels once more, in its parameter's dtype.
    """

    dtype: torch.dtype | None = None
    loss_scale: float = 1.0
    gathers_sums: bool = False


AS_IT_IS = Precision()


class Twin:
    """All ranks in one process. `train` runs a case to its end; `micro` and `step` are the parts of its loop."""

    def __init__(
        self,
        case: Case,
        world: int,
        accumulation: int,
        precision: Precision = AS_IT_IS,
        reduce_at: ReduceAt = "micro_batch",
    ) -> None:
        self.case, self.world, self.accumulation = case, world, accumulation
        self.module = case.seeded_model()
        if precision.dtype is not None:
            for parameter in self.module.parameters():
                parameter.data = parameter.data.to(precision.dtype)
        self._precision = precision
        self._reduce_at = reduce_at
        self._masters = {p: _master(p) for p in self.module.parameters()}
        self.optimizer = case.optimizer([self._own(group) for group in case.groups(self.module)])
        self.scheduler = case.scheduler(self.optimizer) if case.scheduler else None
        self._sums: list[dict[nn.Parameter, Tensor]] = []
        self.zero_grad()
        self.norm = 0.0

    def train(self) -> History:
        """The whole case."""
        history = History()
        for step in range(self.case.steps):
            self.case.before(self.module, step)
            for rank in range(self.world):
                for micro in range(self.accumulation):
                    self.micro(Moment(rank, step, micro))
            self.step()
            history.weights.append(weights_of(self.module))
            history.norms.append(self.norm)
            history.rates.append([group["lr"] for group in self.optimizer.param_groups])
        return history

    def micro(self, at: Moment) -> None:
        """One micro-batch of one rank."""
        with self.rank(at.rank) as engine:
            self.case.micro(engine, at)

    @contextlib.contextmanager
    def rank(self, rank: int) -> Iterator[RankTwin]:
        """The engine of one rank for one micro-batch, whose gradients are added up when the block ends."""
        engine = RankTwin(self.module, self.accumulation, self._precision.loss_scale)
        yield engine
        for parameter, gradient in engine.gradients().items():
            self._sums[rank][parameter] = self._sums[rank].get(parameter, 0) + gradient

    def zero_grad(self) -> None:
        """Drops what was accumulated since the last step."""
        self._sums = [{} for _ in range(self.world)]

    def step(self) -> None:
        """Mean over ranks, clip, one optimizer step, cast to the parameters' dtypes."""
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        trained = {p: m for p, m in self._masters.items() if p.requires_grad and id(m) in owned}
        for parameter, master in self._masters.items():
            master.grad = self._mean(parameter) if parameter in trained else None
        self.norm = float(sum(m.grad.double().square().sum() for m in trained.values())) ** 0.5
        if self.case.clip:
            factor = max(1.0, (self.norm + 1e-6) / self.case.clip)
            for master in trained.values():
                master.grad /= factor
        self.optimizer.step()
        for parameter, master in trained.items():
            parameter.data.copy_(master.data)
        for parameter in self._masters:
            parameter.grad = None
        if self.scheduler:
            self.scheduler.step()
        self.zero_grad()

    def _own(self, group: Any) -> Any:
        """The same optimizer group over masters."""
        if isinstance(group, dict):
            return {**group, "params": [self._masters[p] for p in group["params"]]}
        return self._masters[group]

    def _mean(self, parameter: nn.Parameter) -> Tensor:
        total = torch.zeros_like(parameter, dtype=torch.float64)
        for sums in self._sums:
            if parameter in sums:
                at_boundary = self._reduce_at == "boundary"
                total += sums[parameter].float().to(parameter.dtype) if at_boundary else sums[parameter]
        wide = self._masters[parameter].dtype
        mean = total / self.world
        if self._precision.gathers_sums:
            mean = mean.to(wide).to(parameter.dtype).double()
        return (mean / self._precision.loss_scale).to(wide)


class RankTwin:
    """The part of an engine's surface that a micro-batch may use, for one rank and one micro-batch."""

    def __init__(self, module: nn.Module, accumulation: int, loss_scale: float) -> None:
        self.module = module
        self._accumulation = accumulation
        self._loss_scale = loss_scale
        self._sums: dict[nn.Parameter, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> None:
        """Adds the gradient of the loss, divided by the accumulation steps unless told otherwise."""
        self._add_direct_backwards()
        share = loss / self._accumulation if scale_wrt_gas else loss
        (share * self._loss_scale).backward(retain_graph=retain_graph)
        self._take(1.0)

    def scale(self, loss: Tensor) -> Tensor:
        """For a backward of the caller's own; what it leaves in `.grad` is divided by the accumulation steps."""
        return loss * self._loss_scale

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Everything that this micro-batch brought, in fp64."""
        self._add_direct_backwards()
        return self._sums

    def train(self, mode: bool = True) -> RankTwin:
        self.module.train(mode)
        return self

    def eval(self) -> RankTwin:
        return self.train(False)

    def _add_direct_backwards(self) -> None:
        self._take(1.0 / self._accumulation)

    def _take(self, weight: float) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                self._sums[parameter] = self._sums.get(parameter, 0) + parameter.grad.double() * weight
                parameter.grad = None


def _master(parameter: nn.Parameter) -> Tensor:
    wide = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
    return parameter.detach().to(wide, copy=True)
