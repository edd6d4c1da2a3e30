"""What learning-rate schedules share.

A schedule here is a pure function of the iteration: `lr(i)` and `momentum(i)`, where `i` counts
`step()` calls from 0 and is -1 between construction and the first of them. `Schedule` does the
rest: it writes the values into the groups of the optimizer and keeps the iteration. A saved state
is the iteration alone, so that a run resumed with other parameters follows the new curve from where
it is.

The classes keep DeepSpeed's interface rather than torch's `LRScheduler`: they need no more of an
optimizer than its `param_groups`, and do not watch the order of calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from zerort.errors import ConfigError
from zerort.optim.chain import Chain

__all__ = ["HasGroups", "Schedule", "at_least_0", "count", "per_group", "rates_for", "rates_of"]


class HasGroups(Protocol):
    """What is used of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Its groups, each with a learning rate under `lr`."""


class Schedule:
    """Sets the learning rate of each parameter group, and for `OneCycle` its first beta, once a
    step.

    `last_batch_iteration` is the iteration last applied; -1 applies the starting values at once.
    """

    def __init__(self, optimizer: HasGroups, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = count("last_batch_iteration", last_batch_iteration, least=-1)
        if last_batch_iteration == -1:
            self._apply()

    def lr(self, iteration: int) -> list[float]:
        """Learning rate of each group at `iteration`."""
        raise NotImplementedError

    def momentum(self, iteration: int) -> list[tuple[float, float]] | None:
        """Betas of each group at `iteration`; None leaves them alone."""
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
        return rates_of(self.optimizer)

    def state_dict(self) -> dict[str, int]:
        """The iteration."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved iteration and writes its values into the groups."""
        self.step(state["last_batch_iteration"])

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)  # a captured or compiled step reads this very tensor
            else:
                group["lr"] = lr
        betas = self._written_momentum()
        if betas is not None:
            for group, pair in zip(groups, betas, strict=True):
                if "betas" in group:
                    group["betas"] = pair

    def _written_momentum(self) -> list[tuple[float, float]] | None:
        return self.momentum(self.last_batch_iteration)


def rates_of(optimizer: HasGroups) -> list[float]:
    """The groups' learning rates as they stand."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def rates_for(optimizer: HasGroups, name: str, value: float | Sequence[float]) -> list[float]:
    """The rate `name`, one or one a group, for each group. One is the first group's where several
    optimizers are one: the others' keep their ratio to it. Raises `ConfigError`.
    """
    rates = per_group(optimizer, name, value)
    if isinstance(optimizer, Chain) and not isinstance(value, list | tuple):
        return [rate * ratio for rate, ratio in zip(rates, optimizer.ratios, strict=True)]
    return rates


def per_group(optimizer: HasGroups, name: str, value: float | Sequence[float]) -> list[float]:
    """The parameter `name`, one value or one a group, for each group. Raises `ConfigError`."""
    groups = len(optimizer.param_groups)
    values = list(value) if isinstance(value, list | tuple) else [value] * groups
    if len(values) != groups:
        raise ConfigError(
            f"scheduler.params.{name}: expected {groups} values, one a parameter group, got "
            f"{len(values)}"
        )
    return [at_least_0(name, each) for each in values]


def at_least_0(name: str, value: Any) -> float:
    """The parameter `name`. Raises `ConfigError` for what is no number of at least 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ConfigError(
            f"scheduler.params.{name}: expected a number of at least 0, got {value!r}"
        )
    return float(value)


def count(name: str, value: Any, *, least: int = 1) -> int:
    """The parameter `name`. Raises `ConfigError` for what is no integer of at least `least`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value < math.inf or value != int(value):
        raise ConfigError(
            f"scheduler.params.{name}: expected an integer of at least {least}, got {value!r}"
        )
    return int(value)
