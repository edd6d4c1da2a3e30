"""Interleaved rounds: A B C ..., A B C ..., so that what the machine does meanwhile meets every
contender alike.

A figure is wall or CPU seconds per step of one contender in one round: wall is the slowest rank's,
CPU the sum of all threads of all ranks. Ranks meet before a contender's turn and not within it, so
that work which spills into the next forward is not punished. Ratios are taken within a round and
only then summarised.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median

import torch
import torch.distributed as dist

from contenders import Step
from workloads import Workload


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        middle, low, high = (format(value, spec) for value in (self.median, self.low, self.high))
        # A backslash keeps rich from reading the bracket as markup.
        return rf"{middle} \[{low} .. {high}]"


@dataclass
class Runs:
    """One contender's figures, a value per round, and its mean loss over the ranks, a value per
    step.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def against(self, base: Runs) -> dict[str, Spread]:
        """Ratios to `base`, round by round."""
        return {
            "wall": Spread.of(
                [mine / theirs for mine, theirs in zip(self.wall, base.wall, strict=True)]
            ),
            "cpu": Spread.of(
                [mine / theirs for mine, theirs in zip(self.cpu, base.cpu, strict=True)]
            ),
        }

    def deviation(self, base: Runs) -> float:
        """The largest relative difference of a loss from `base`'s."""
        pairs = zip(self.losses, base.losses, strict=True)
        return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)

    def figures(self, base: Runs) -> dict[str, object]:
        """Everything there is to know, as plain values: seconds per step and ratios to `base`."""
        return {
            "wall": asdict(Spread.of(self.wall)),
            "cpu": asdict(Spread.of(self.cpu)),
            "ratio": {name: asdict(spread) for name, spread in self.against(base).items()},
            "deviation": self.deviation(base),
            "wall by round": self.wall,
            "cpu by round": self.cpu,
            "losses": self.losses,
        }


class Race:
    """All contenders of a workload, alive side by side in this process."""

    def __init__(self, workload: Workload, steps: Mapping[str, Step], device: torch.device) -> None:
        self.runs = {name: Runs() for name in steps}
        self._workload = workload
        self._steps = steps
        self._device = device
        self._next = 0

    def warm_up(self, count: int) -> None:
        """Untimed steps: allocation, learnt orders, caches. Their losses count."""
        self._round(count, timed=False)

    def round(self, count: int) -> None:
        """Each contender's turn of `count` steps on the same batches."""
        self._round(count, timed=True)

    def _round(self, count: int, *, timed: bool) -> None:
        rank = dist.get_rank()
        indices = range(self._next, self._next + count)
        batches = [self._workload.batch(index, rank, self._device) for index in indices]
        for name, step in self._steps.items():
            runs = self.runs[name]
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            losses = torch.stack([step(batch) for batch in batches]).double()
            self._finish()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            getattr(step, "settle", _nothing)()
            slowest, total, losses = self._over_ranks(wall / count, cpu / count, losses)
            runs.losses += losses
            if timed:
                runs.wall.append(slowest)
                runs.cpu.append(total)
        self._next += count

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _over_ranks(
        self, wall: float, cpu: float, losses: torch.Tensor
    ) -> tuple[float, float, list[float]]:
        slowest = torch.tensor(wall, dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        sums = torch.cat((losses, losses.new_tensor([cpu])))
        dist.all_reduce(sums)
        *means, total = sums.tolist()
        return slowest.item(), total, [mean / dist.get_world_size() for mean in means]


def _nothing() -> None:
    """No step has left anything to do."""
