"""Learning rates that warm up, then stay, or go down in a straight line or by a cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from zerort.errors import ConfigError
from zerort.optim.schedule import HasGroups, Schedule, at_least_0, count, rates_for, rates_of

__all__ = ["WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]


class _Warmup(Schedule):
    """What the warm-up schedules share: how far the warm-up has come."""

    def __init__(
        self,
        optimizer: HasGroups,
        warmup_num_steps: int,
        warmup_type: Literal["log", "linear"],
        last_batch_iteration: int,
    ) -> None:
        # Over fewer than two steps the logarithm has no slope.
        self.warmup_num_steps = max(2, count("warmup_num_steps", warmup_num_steps, least=0))
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
        optimizer: HasGroups,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        top = rates_of(optimizer) if warmup_max_lr is None else warmup_max_lr
        self.min_lrs = rates_for(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = rates_for(optimizer, "warmup_max_lr", top)
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
        optimizer: HasGroups,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = count("total_num_steps", total_num_steps)
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
        optimizer: HasGroups,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.base_lrs = rates_of(optimizer)
        self.total_num_steps = count("total_num_steps", total_num_steps)
        self.warmup_min_ratio = at_least_0("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = at_least_0("cos_min_ratio", cos_min_ratio)
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def lr(self, iteration: int) -> list[float]:
        """The groups' own rates, times the ratio."""
        ratio = self._ratio(iteration)
        return [lr * ratio for lr in self.base_lrs]

    def get_lr_ratio(self) -> float:
        """What the groups' own rates are multiplied by at the current iteration."""
        return self._ratio(self.last_batch_iteration)

    def _ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._warmth(iteration)
        steps = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (iteration - self.warmup_num_steps + 1) / steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * cosine)
