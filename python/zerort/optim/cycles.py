"""Learning rates that climb: without end, to find the largest that trains, or in one cycle up and
down.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from zerort.optim.schedule import HasGroups, Schedule, at_least_0, count, per_group, rates_for

__all__ = ["LRRangeTest", "OneCycle"]

_log = logging.getLogger("zerort")

_SECOND_BETA = 0.99


class LRRangeTest(Schedule):
    """A learning rate that grows without end, to find the largest that trains (Smith,
    arXiv:1803.09820).

    It starts from `lr_range_test_min_lr` (one, or one a group) and gains `lr_range_test_step_rate`
    times that much every `lr_range_test_step_size` steps, evenly or, with
    `lr_range_test_staircase`, at once.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = rates_for(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = count("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = at_least_0("lr_range_test_step_rate", lr_range_test_step_rate)
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

    Momenta too are one, or one a group. Where they are cycled the second beta is 0.99, as in
    DeepSpeed. A group without betas keeps its momentum.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = 0.8,
        cycle_max_mom: float | Sequence[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = rates_for(optimizer, "cycle_min_lr", cycle_min_lr)
        self.max_lrs = rates_for(optimizer, "cycle_max_lr", cycle_max_lr)
        self.min_moms = per_group(optimizer, "cycle_min_mom", cycle_min_mom)
        self.max_moms = per_group(optimizer, "cycle_max_mom", cycle_max_mom)
        first = count("cycle_first_step_size", cycle_first_step_size)
        second = first if cycle_second_step_size is None else cycle_second_step_size
        self.steps = (first, count("cycle_second_step_size", second, least=0))
        stairs = count("cycle_first_stair_count", cycle_first_stair_count, least=0)
        second = stairs if cycle_second_stair_count is None else cycle_second_stair_count
        self.stairs = (stairs, count("cycle_second_stair_count", second, least=0))
        self.decay_step_size = count("decay_step_size", decay_step_size, least=0)
        self.decay_rates = (
            at_least_0("decay_lr_rate", decay_lr_rate),
            at_least_0("decay_mom_rate", decay_mom_rate),
        )
        self.cycle_momentum = cycle_momentum and any("betas" in g for g in optimizer.param_groups)
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

    def momentum(self, iteration: int) -> list[tuple[float, float]] | None:
        """From the upper to the lower beta and back, then above the upper one."""
        if not self.cycle_momentum:
            return None
        if iteration < sum(self.steps):
            height = self._height(iteration + 1)
            pairs = zip(self.min_moms, self.max_moms, strict=True)
            return [(high - (high - low) * height, _SECOND_BETA) for low, high in pairs]
        factor = 1 + self.decay_rates[1] * self._decay_intervals(iteration)
        return [(high * factor, _SECOND_BETA) for high in self.max_moms]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Betas of the current iteration; None where momentum is not cycled."""
        return self.momentum(self.last_batch_iteration)

    def _written_momentum(self) -> list[tuple[float, float]] | None:
        if self.cycle_momentum and self.last_batch_iteration < 0:
            # DeepSpeed starts at the wrong end for the one value before the first step.
            return [(low, _SECOND_BETA) for low in self.min_moms]
        return super()._written_momentum()

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
