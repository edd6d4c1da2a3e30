"""The naive twin: what N ranks should have computed, by one process that loops over all of their
data.

A `Case` says what is trained: a model, an optimizer, and one function that runs a micro-batch on
anything that quacks like an engine. The `Twin` runs it for every rank and micro-batch in turn with
plain autograd, averages the gradients, and gives them to a plain torch optimizer over whole
parameters. It knows no buckets, shards, views, hooks or schedules.

Its arithmetic is that of the contract: a missing gradient is zero, a frozen parameter is untouched,
gradients are clipped by `max(1, (norm + 1e-6) / limit)`, parameters of less than fp32 have fp32
masters. Sums are in fp64, so that a difference to the twin is the other side's rounding.
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
    """What is trained. `micro(engine, moment)` runs forward and backward of one micro-batch,
    without `step`.
    """

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
    """The dtype that parameters are cast to (None: as the model has them), a fixed loss scale, and
    autocast's dtype.

    With `gathers_sums` the mean of the ranks' gradients travels once more.
    """

    dtype: torch.dtype | None = None
    loss_scale: float = 1.0
    autocast: torch.dtype | None = None
    gathers_sums: bool = False


AS_IT_IS = Precision()

COMPUTED_LOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What autocast computes in its dtype, so that gradients travel in it."""


@dataclass
class RankSums:
    """One rank's gradients of the step under way, in fp64, and the dtype that each travels in."""

    wires: dict[nn.Parameter, torch.dtype]
    passes: list[dict[nn.Parameter, Tensor]] = field(default_factory=list)
    waiting: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """What no pass has taken yet."""

    def wait(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Adds gradients of a backward."""
        for parameter, gradient in gradients.items():
            self.waiting[parameter] = self.waiting.get(parameter, 0) + gradient

    def travel(self, weight: float) -> None:
        """A pass: what waits goes over its wire, and is multiplied by `weight` there."""
        self.passes.append(
            {p: _rounded(total, self.wires[p]) * weight for p, total in self.waiting.items()}
        )
        self.waiting.clear()


class Twin:
    """All ranks in one process. `train` runs a case to its end; `micro` and `step` are the parts of
    its loop.
    """

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
        self._wires = {p: p.dtype for p in self.module.parameters()}
        for part in self.module.modules():
            if precision.autocast is not None and type(part) in COMPUTED_LOW:
                self._wires |= dict.fromkeys(part.parameters(recurse=False), precision.autocast)
        self.optimizer = case.optimizer([self._own(group) for group in case.groups(self.module)])
        self.scheduler = case.scheduler(self.optimizer) if case.scheduler else None
        self._sums: list[RankSums] = []
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
        travels = self._reduce_at == "micro_batch" or at.micro == self.accumulation - 1
        engine = RankTwin(
            self.module, self.accumulation, self._precision, self._sums[at.rank], travels
        )
        self.case.micro(engine, at)
        engine.add_direct_backwards()

    def zero_grad(self) -> None:
        """Drops what was accumulated since the last step."""
        self._sums = [RankSums(self._wires) for _ in range(self.world)]

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
        wide = self._masters[parameter].dtype
        total = torch.zeros_like(parameter, dtype=torch.float64)
        for number in range(max(len(sums.passes) for sums in self._sums)):
            for sums in self._sums:
                if number < len(sums.passes) and parameter in sums.passes[number]:
                    total += sums.passes[number][parameter] / self.world
            if self._precision.gathers_sums:
                total = _rounded(total, self._wires[parameter])
        return (total / self._precision.loss_scale).to(wide)


class RankTwin:
    """The part of an engine's surface that a micro-batch may use, for one rank and one micro-batch.

    `travels` says whether gradients are reduced in this micro-batch: each of its backwards is a
    pass then.
    """

    def __init__(
        self,
        module: nn.Module,
        accumulation: int,
        precision: Precision,
        sums: RankSums,
        travels: bool = True,
    ) -> None:
        self.module = module
        self._accumulation = accumulation
        self._precision = precision
        self._sums = sums
        self._travels = travels
        self._scaled = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.add_direct_backwards()
        with torch.autocast(
            "cpu", self._precision.autocast, enabled=self._precision.autocast is not None
        ):
            return self.module(*args, **kwargs)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> None:
        """Adds the gradient of the loss, divided by the accumulation steps unless asked not to."""
        self.add_direct_backwards()
        share = loss / self._accumulation if scale_wrt_gas else loss
        (share * self._precision.loss_scale).backward(retain_graph=retain_graph)
        self._take(1.0)

    def scale(self, loss: Tensor) -> Tensor:
        """For a backward of the caller's own, which is divided before it runs."""
        self.add_direct_backwards()
        self._scaled = True
        return loss / self._accumulation * self._precision.loss_scale

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within, backwards are no passes: the next one outside takes them along."""
        travels, self._travels = self._travels, False
        yield
        self._travels = travels

    def zero_grad(self) -> None:
        """Drops what this rank has brought since the last step."""
        self.add_direct_backwards()
        self._sums.passes.clear()
        self._sums.waiting.clear()

    def train(self, mode: bool = True) -> RankTwin:
        self.module.train(mode)
        return self

    def eval(self) -> RankTwin:
        return self.train(False)

    def add_direct_backwards(self) -> None:
        """Takes over what a backward of the caller's own has left: divided when it is reduced,
        unless it was scaled.
        """
        if any(parameter.grad is not None for parameter in self.module.parameters()):
            self._take(1.0 if self._scaled else 1.0 / self._accumulation)
            self._scaled = False

    def _take(self, weight: float) -> None:
        gradients = {p: p.grad.double() for p in self.module.parameters() if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        self._sums.wait(gradients)
        if self._travels:
            self._sums.travel(weight)


def _rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """To what `dtype` can hold, by way of fp32 where that is narrower."""
    return total.double() if dtype.itemsize > 4 else total.float().to(dtype).double()


def _master(parameter: nn.Parameter) -> Tensor:
    wide = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
    return parameter.detach().to(wide, copy=True)
