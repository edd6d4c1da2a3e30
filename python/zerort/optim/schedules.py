"""Learning-rate schedules by name: DeepSpeed's five, with its parameters and formulas, and any of
torch's.

A schedule here is a pure function of the iteration: `lr(i)` and `momentum(i)`, where `i` counts
`step()` calls from 0 and is -1 between construction and the first of them. `Schedule` does the
rest: it writes the values into the groups of the optimizer and keeps the iteration. A saved state
is the iteration alone, so that a run resumed with other parameters follows the new curve from where
it is.

The classes keep DeepSpeed's interface rather than torch's `LRScheduler`: they need no more of an
optimizer than its `param_groups`, and do not watch the order of calls.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from zerort.config.problems import did_you_mean, nearest
from zerort.errors import ConfigError

__all__ = [
    "LRRangeTest",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "build",
]

_log = logging.getLogger("zerort")


class _HasGroups(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Schedule:
    """Sets the learning rate of each parameter group, and for `OneCycle` its first beta, once a
    step.

    `last_batch_iteration` is the iteration last applied; -1 applies the starting values at once.
    """

    def __init__(self, optimizer: _HasGroups, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = _count("last_batch_iteration", last_batch_iteration, least=-1)
        if last_batch_iteration == -1:
            self._apply()

    def lr(self, iteration: int) -> list[float]:
        """Learning rate of each group at `iteration`."""
        raise NotImplementedError

    def momentum(self, iteration: int) -> tuple[float, float] | None:
        """Betas of every group at `iteration`; None leaves them alone."""
        return None

    def step(self, batch_iteration: int | None = None) -> None:
        """Goes to the next iteration, or to `batch_iteration`, and writes its values into the
        groups.
        """
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if batch_iteration is None else batch_iteration
        )
        self._apply()

    def get_lr(self) -> list[float]:
        """Learning rates of the current iteration."""
        return self.lr(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """Learning rates as they stand in the groups."""
        return _rates_of(self.optimizer)

    def state_dict(self) -> dict[str, int]:
        """The iteration."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved iteration and writes its values into the groups."""
        self.step(state["last_batch_iteration"])

    def _apply(self) -> None:
        betas = self.momentum(self.last_batch_iteration)
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)  # a captured or compiled step reads this very tensor
            else:
                group["lr"] = lr
            if betas is not None:
                group["betas"] = betas


class LRRangeTest(Schedule):
    """A learning rate that grows without end, to find the largest that trains (Smith,
    arXiv:1803.09820).

    It starts from `lr_range_test_min_lr` (one, or one a group) and gains `lr_range_test_step_rate`
    times that much every `lr_range_test_step_size` steps, evenly or, with
    `lr_range_test_staircase`, at once.
    """

    def __init__(
        self,
        optimizer: _HasGroups,
        *,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = _per_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _count("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = _at_least_0("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def lr(self, iteration: int) -> list[float]:
        """The start, times one plus the rate for every interval gone by."""
        intervals = (iteration + 1) / self.step_size
        if self.staircase:
            intervals = math.floor(intervals)
        return [lr * (1 + self.step_rate * intervals) for lr in self.min_lrs]


class OneCycle(Schedule):
    """One cycle of the learning rate up and down, with the first beta down and up, then a decay
    (arXiv:1803.09820).

    The cycle climbs from `cycle_min_lr` to `cycle_max_lr` (one, or one a group) in
    `cycle_first_step_size` steps and returns in `cycle_second_step_size` (the same when None); a
    stair count holds it flat for each of that many stairs. Afterwards the learning rate is divided,
    and the beta multiplied, by one plus its rate for every `decay_step_size` steps.

    Where momentum is cycled the second beta is 0.99, as in DeepSpeed. An optimizer without betas
    keeps its momentum.
    """

    def __init__(
        self,
        optimizer: _HasGroups,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        *,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = _per_group(optimizer, "cycle_min_lr", cycle_min_lr)
        self.max_lrs = _per_group(optimizer, "cycle_max_lr", cycle_max_lr)
        self.moms = (
            _at_least_0("cycle_min_mom", cycle_min_mom),
            _at_least_0("cycle_max_mom", cycle_max_mom),
        )
        first = _count("cycle_first_step_size", cycle_first_step_size)
        second = first if cycle_second_step_size is None else cycle_second_step_size
        self.steps = (first, _count("cycle_second_step_size", second, least=0))
        stairs = _count("cycle_first_stair_count", cycle_first_stair_count, least=0)
        second = stairs if cycle_second_stair_count is None else cycle_second_stair_count
        self.stairs = (stairs, _count("cycle_second_stair_count", second, least=0))
        self.decay_step_size = _count("decay_step_size", decay_step_size, least=0)
        self.decay_rates = (
            _at_least_0("decay_lr_rate", decay_lr_rate),
            _at_least_0("decay_mom_rate", decay_mom_rate),
        )
        self.cycle_momentum = cycle_momentum and "betas" in optimizer.param_groups[0]
        if cycle_momentum and not self.cycle_momentum:
            _log.warning(
                "OneCycle leaves the momentum alone: %s has no betas", type(optimizer).__name__
            )
        super().__init__(optimizer, last_batch_iteration)

    def lr(self, iteration: int) -> list[float]:
        """From the lower to the upper rate and back, then below the lower one."""
        if iteration < sum(self.steps):
            height = self._height(iteration + 1)
            return [
                low + (high - low) * height
                for low, high in zip(self.min_lrs, self.max_lrs, strict=True)
            ]
        divisor = 1 + self.decay_rates[0] * self._decay_intervals(iteration)
        return [low / divisor for low in self.min_lrs]

    def momentum(self, iteration: int) -> tuple[float, float] | None:
        """From the upper to the lower beta and back, then above the upper one."""
        if not self.cycle_momentum:
            return None
        low, high = self.moms
        if iteration < 0:
            beta = low  # DeepSpeed starts at the wrong end for the one value before the first step
        elif iteration < sum(self.steps):
            beta = high - (high - low) * self._height(iteration + 1)
        else:
            beta = high * (1 + self.decay_rates[1] * self._decay_intervals(iteration))
        return beta, 0.99

    def _height(self, iteration: int) -> float:
        # 0 at the foot of the cycle, 1 at its top. Stairs are counted from the integer position: a
        # height of 1 less one rounding error would lose the topmost stair.
        first, second = self.steps
        position = iteration % (first + second)
        climbing = position <= first
        done, length = (position, first) if climbing else (first + second - position, second)
        stairs = self.stairs[0 if climbing else 1]
        return math.floor(done * stairs / length) / stairs if stairs > 0 else done / length

    def _decay_intervals(self, iteration: int) -> float:
        return (
            (iteration - sum(self.steps) + 1) / self.decay_step_size
            if self.decay_step_size
            else 0.0
        )


class _Warmup(Schedule):
    """What the warm-up schedules share: how far the warm-up has come."""

    def __init__(
        self,
        optimizer: _HasGroups,
        warmup_num_steps: int,
        warmup_type: Literal["log", "linear"],
        last_batch_iteration: int,
    ) -> None:
        # Over fewer than two steps the logarithm has no slope.
        self.warmup_num_steps = max(2, _count("warmup_num_steps", warmup_num_steps))
        if warmup_type not in ("log", "linear"):
            raise ConfigError(
                f'scheduler.params.warmup_type: expected "log" or "linear", got {warmup_type!r}'
            )
        self.warmup_type = warmup_type
        super().__init__(optimizer, last_batch_iteration)

    def _warmth(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if self.warmup_type == "log":
            return math.log(iteration + 1) / math.log(self.warmup_num_steps)
        return iteration / self.warmup_num_steps


class WarmupLR(_Warmup):
    """From `warmup_min_lr` to `warmup_max_lr` (one, or one a group) in `warmup_num_steps` steps,
    then constant.

    A `warmup_max_lr` of None is each group's own learning rate. `warmup_type` "log" rises fast and
    then slowly.
    """

    def __init__(
        self,
        optimizer: _HasGroups,
        *,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        top = _rates_of(optimizer) if warmup_max_lr is None else warmup_max_lr
        self.min_lrs = _per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = _per_group(optimizer, "warmup_max_lr", top)
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def lr(self, iteration: int) -> list[float]:
        """Between the two rates, by how far the schedule has come."""
        warm = iteration < self.warmup_num_steps
        height = self._warmth(iteration) if warm else self._after_warmup(iteration)
        return [
            low + (high - low) * height
            for low, high in zip(self.min_lrs, self.max_lrs, strict=True)
        ]

    def _after_warmup(self, iteration: int) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, then a straight line back to `warmup_min_lr` at `total_num_steps`."""

    def __init__(
        self,
        optimizer: _HasGroups,
        total_num_steps: int,
        *,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _count("total_num_steps", total_num_steps)
        super().__init__(
            optimizer,
            warmup_min_lr=warmup_min_lr,
            warmup_max_lr=warmup_max_lr,
            warmup_num_steps=warmup_num_steps,
            warmup_type=warmup_type,
            last_batch_iteration=last_batch_iteration,
        )

    def _after_warmup(self, iteration: int) -> float:
        return max(
            0.0,
            (self.total_num_steps - iteration)
            / max(1, self.total_num_steps - self.warmup_num_steps),
        )


class WarmupCosineLR(_Warmup):
    """Each group's own learning rate times a ratio: `warmup_min_ratio` to 1, then half a cosine to
    `cos_min_ratio`.

    The cosine ends at `total_num_steps` and stays at its end. Before the first step the ratio is 0.
    """

    def __init__(
        self,
        optimizer: _HasGroups,
        total_num_steps: int,
        *,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.base_lrs = _rates_of(optimizer)
        self.total_num_steps = _count("total_num_steps", total_num_steps)
        self.warmup_min_ratio = _at_least_0("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = _at_least_0("cos_min_ratio", cos_min_ratio)
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def lr(self, iteration: int) -> list[float]:
        """The groups' own rates, times the ratio."""
        ratio = self._ratio(iteration)
        return [lr * ratio for lr in self.base_lrs]

    def _ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._warmth(iteration)
        steps = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (iteration - self.warmup_num_steps + 1) / steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * cosine)


_SCHEDULES: Mapping[str, Callable[..., Any]] = {
    schedule.__name__: schedule
    for schedule in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def build(name: str, params: Mapping[str, Any], optimizer: _HasGroups) -> Any:
    """The schedule `name` over `optimizer`: one of this module's, else one of
    `torch.optim.lr_scheduler`.

    Raises `ConfigError` for an unknown name or parameter, with the nearest known one, and for
    values that the schedule does not take.
    """
    known = {**_torch_schedules(), **_SCHEDULES}
    if name not in known:
        raise ConfigError(
            f'scheduler.type: unknown schedule "{name}"{did_you_mean(nearest(name, known))}'
        )
    schedule = known[name]
    signature = inspect.signature(schedule)
    for key in params:
        if key not in signature.parameters or key == "optimizer":
            names = [parameter for parameter in signature.parameters if parameter != "optimizer"]
            guess = did_you_mean(nearest(key, names))
            raise ConfigError(f"scheduler.params.{key}: no parameter of {name}{guess}")
    try:
        made = schedule(optimizer, **params)
    except ConfigError:
        raise
    except Exception as error:  # of any kind: the values come from a file
        raise ConfigError(
            f"scheduler.params: {name} does not take them: {str(error) or type(error).__name__}"
        ) from error
    for index, group in enumerate(optimizer.param_groups):
        if not 0 <= float(group["lr"]) < math.inf:
            raise ConfigError(
                f"scheduler.params: {name} gives group {index} of the optimizer the learning rate "
                f"{float(group['lr'])}"
            )
    return made


def _torch_schedules() -> dict[str, Callable[..., Any]]:
    module = torch.optim.lr_scheduler
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, module.LRScheduler)
        and name in module.__all__
        and value is not module.LRScheduler
    }


def _rates_of(optimizer: _HasGroups) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _per_group(optimizer: _HasGroups, name: str, value: float | Sequence[float]) -> list[float]:
    groups = len(optimizer.param_groups)
    values = list(value) if isinstance(value, list | tuple) else [value] * groups
    if len(values) != groups:
        raise ConfigError(
            f"scheduler.params.{name}: expected {groups} values, one a parameter group, got "
            f"{len(values)}"
        )
    return [_at_least_0(name, each) for each in values]


def _at_least_0(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ConfigError(
            f"scheduler.params.{name}: expected a number of at least 0, got {value!r}"
        )
    return float(value)


def _count(name: str, value: Any, *, least: int = 1) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value < math.inf or value != int(value):
        raise ConfigError(
            f"scheduler.params.{name}: expected an integer of at least {least}, got {value!r}"
        )
    return int(value)
