"""What a step could be at best: communication beside computing in both directions, and nothing else
waited for.

`max(forward, publish) + max(backward, reduce) + vote + optimizer`, each measured by itself: forward
and backward of the model without communication, the rest with an engine of stage 2 between the same
ranks while nothing else runs. Of each the slowest rank's median counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from contenders import stage_2
from workloads import Workload

_ROUNDS = 7
_WARM_UP = 3


@dataclass(frozen=True)
class Limit:
    """Seconds."""

    forward: float
    backward: float
    publish: float
    reduce: float
    vote: float
    optimizer: float

    @property
    def step(self) -> float:
        """The best that a step can be."""
        beside = max(self.forward, self.publish) + max(self.backward, self.reduce)
        return beside + self.vote + self.optimizer

    def __str__(self) -> str:
        parts = " ".join(f"{name} {1000 * value:.0f}" for name, value in vars(self).items())
        return f"limit {1000 * self.step:.0f} ms: {parts}"


def limit_of(workload: Workload, device: torch.device) -> Limit:
    """All ranks call it."""
    forward, backward = _computing(workload, device)
    engine = stage_2(workload, device)
    batch = workload.batch(0, dist.get_rank(), device)
    for _ in range(_WARM_UP):
        engine.backward(workload.loss(engine(batch[0]), batch[1]))
        engine.step()
    boundary, reduction = engine._parts.boundary, engine._parts.reduction
    control = engine._parts.mesh.control

    def reduce() -> None:
        reduction.begin(1.0)
        reduction.finish()
        reduction.drain()
        reduction.reset()

    def update() -> None:
        for group in boundary.optimizer.batches():
            boundary.optimizer.step(1.0, group)

    found = Limit(
        forward,
        backward,
        publish=_slowest(reduction.publish),
        reduce=_slowest(reduce),
        vote=_slowest(lambda: control.all_reduce(torch.zeros(8))),
        optimizer=_slowest(update),
    )
    engine.destroy()
    return found


def _computing(workload: Workload, device: torch.device) -> tuple[float, float]:
    model = workload.model(device)
    batch = workload.batch(0, dist.get_rank(), device)
    losses: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast(device.type, workload.dtype, enabled=workload.autocasts):
            losses[:] = [workload.loss(model(batch[0]), batch[1])]

    def both() -> None:
        forward()
        losses[0].backward()
        model.zero_grad()

    alone = _slowest(forward)
    return alone, _slowest(both) - alone


def _slowest(call: Callable[[], None]) -> float:
    times = []
    for _ in range(_ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    seconds = torch.tensor(median(times), dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)
