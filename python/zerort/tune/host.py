"""What a bucket costs its host: so much however small it is, and so much for each byte or element.

A run alone cannot tell the two apart: buckets of one plan are about as long as one another, and
what is spent on them in a step is one sum. So the work around a bucket is tried on memory of its
own, once on next to nothing and once on much. From that comes how a sum is shared out between
buckets and bytes; how large it is, the run says.

What it guarantees: nothing of the engine changes, and no random number is drawn; the optimizer's
own tensors, state and options are not touched, because a twin of it steps. What it does not do: it
communicates nothing, and no optimizer but torch's own is stepped behind its user's back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from zerort.device import Device, device_for
from zerort.memory import FlatModel, Memory
from zerort.mesh import Mesh
from zerort.optim import ShardOptimizer, Update, members_of
from zerort.optim.twin import Twin
from zerort.tune.fit import Line, middle

__all__ = ["Host", "measure_host"]

_LITTLE, _MUCH, _STATE = 16, 1 << 22, 1 << 18
"""Elements: a cache line of fp32; what comes from memory, as gradients do; and enough to update,
which passes over each several times.
"""
_ROUNDS = 7
"""How often each is timed; one more comes before, which meets cold memory."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Host:
    """Of one rank."""

    pack: Line
    """Of a bucket, and of a byte of its gradient; its collective is not in it."""
    sums: Line
    """Of a bucket, and of a byte that has arrived and is added up."""
    update: Line | None
    """Of a bucket, and of an element of it that this rank owns. None where that cannot be tried."""


def measure_host(mesh: Mesh, flat: FlatModel, optimizer: Update) -> Host:
    """Between passes and updates."""
    device, world = device_for(mesh.device), mesh.shard.world
    params = [parameter.numel() for parameter in flat.params]
    typical = max(1, sum(params) // max(1, len(params)))
    return Host(
        _line(lambda numel: _packs(device, numel, typical), _MUCH, nbytes=4),
        _line(lambda numel: _sums(device, numel, world), _MUCH, nbytes=4),
        _update(optimizer),
    )


def _line(run_of: Callable[[int], Run], many: int, nbytes: int = 1) -> Line:
    """Through few and `many` elements of so many bytes."""
    little, much = (_timed(run_of(numel)) for numel in (_LITTLE, many))
    return Line(little, max(0.0, much - little) / (nbytes * (many - _LITTLE)))


def _timed(run: Run) -> float:
    times = []
    for _ in range(1 + _ROUNDS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return middle(times[1:])


def _packs(device: Device, numel: int, length: int) -> Run:
    """Gradients of parameters of this length: many short ones take longer than a few long ones."""
    gradients, sent = (
        torch.split(torch.zeros(numel, device=device.place), length) for _ in range(2)
    )
    return lambda: torch._foreach_copy_(sent, gradients)


def _sums(device: Device, numel: int, world: int) -> Run:
    """So many elements of all ranks."""
    numel = max(1, numel // world)
    arrived, summed = (
        Memory.zeros(length, torch.float32, device.place) for length in (world * numel, numel)
    )
    return lambda: device.reduce(arrived, summed, world=world, stride=numel, scale=1.0, add=False)


def _update(optimizer: Update) -> Line | None:
    """An update of one bucket, alone. Whole parameters are as many in whatever buckets they lie."""
    if not isinstance(optimizer, ShardOptimizer) or optimizer.whole:
        return None
    if not optimizer.steps_in_parts:
        return None
    member = next((each for each in members_of(optimizer.optimizer) if each.param_groups), None)
    if member is None:
        return None
    try:
        return _line(lambda numel: _steps(Twin(member), numel), _STATE)
    except Exception:  # peers go on, and this rank's other figures are as good
        return None


def _steps(twin: Twin, numel: int) -> Run:
    parameter = nn.Parameter(torch.zeros(numel))
    parameter.grad = torch.zeros(numel)
    twin.give(0, [parameter])
    return twin.step
