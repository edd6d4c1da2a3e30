"""Which parameters are gathered and freed together at stage 3, and how much may be whole at once.

A unit is a run of subtrees of the module tree, cut by the core; nothing is wrapped. Small
parameters stay whole on every rank, as at stage 2: an all-gather for a bias would cost more than
its memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from zerort import _core
from zerort.config import Config
from zerort.grads.course import Routed
from zerort.grads.reduction import Reduction
from zerort.memory import FlatModel, PlannedParameter
from zerort.mesh import Mesh
from zerort.params.contract import Heir
from zerort.params.hall import Place
from zerort.params.passes import Passes, Resident, Room
from zerort.params.pins import Pins
from zerort.params.roll import RollCall
from zerort.params.uses import Uses
from zerort.start.caps import Cap

__all__ = ["Standing", "in_units", "passes_over", "room_for"]

_log = logging.getLogger("zerort")


@dataclass(frozen=True)
class Standing:
    """Where an engine of stage 3 stands among others."""

    place: Place
    """In roll calls."""
    heir: Heir
    """Who has its parameters when it has gone."""


_MOST_STOPS_AHEAD = 8


def in_units(
    settings: Config, model: nn.Module, planned: Sequence[PlannedParameter], cap: Cap
) -> tuple[Sequence[PlannedParameter], list[int | None] | None]:
    """What is planned, and the unit of each, None for one that stays whole; no units below stage 3.
    `cap` is that of a bucket.

    What no optimizer has and stays whole needs no plan: it is left out.
    """
    if not settings.zero_optimization.shards_parameters:
        return planned, None
    index = {id(member.tensor): i for i, member in enumerate(planned)}
    numels = [member.tensor.numel() for member in planned]
    for persistent in _persistent(settings, numels):
        numels[persistent] = -1
    units = _core.cut_units(_tree(model, index), numels, cap=_cap(settings, planned, cap))
    kept = [
        (member, unit)
        for member, unit in zip(planned, units, strict=True)
        if member.group is not None or unit is not None
    ]
    return [member for member, _ in kept], [unit for _, unit in kept]


def room_for(settings: Config, plan: _core.Plan, names: Sequence[str] | None) -> Room:
    """Elements, and how far ahead gathers go. A unit that is larger has room alone, which is
    logged where parameters have `names`.
    """
    zero, largest = settings.zero_optimization, max((unit.numel for unit in plan.units), default=1)
    whole = sum(unit.numel for unit in plan.units)
    elements = settings.room(whole, largest)
    ahead = min(_MOST_STOPS_AHEAD, -(-zero.stage3_prefetch_bucket_size // largest))
    if largest > elements and names is not None:
        unit = max(plan.units, key=lambda unit: unit.numel)
        _log.warning(
            "unit %d (%s and %d more parameters) has %d elements, more than room for %d "
            "(zero_optimization.stage3_max_live_parameters): it is gathered alone, without "
            "anything ahead",
            unit.id,
            names[unit.params[0]],
            len(unit.params) - 1,
            unit.numel,
            elements,
        )
    return Room(max(elements, 1), ahead)


def passes_over(
    model: nn.Module,
    flat: FlatModel,
    reduction: Reduction,
    mesh: Mesh,
    room: Room | None,
    standing: Standing | None,
) -> Passes | Resident:
    """What gathers the model's parameters, with its hooks on the model."""
    if room is None or standing is None:
        return Resident()
    course = reduction.course
    assert isinstance(course, Routed)
    rolls = RollCall(
        course,
        reduction.executor,
        mesh.control,
        lambda: reduction.follow_routes(room.elements, room.depth),
        standing.place,
    )
    passes = Passes(course, reduction.executor, rolls)
    units = {
        id(parameter): bucket.spec.unit
        for bucket in flat.buckets
        if bucket.spec.unit is not None
        for parameter in bucket.params
    }
    pins = Pins(passes, reduction.executor, mesh.job, units)
    Uses(model, flat, passes, pins, units, standing.heir)
    return passes


def _persistent(settings: Config, numels: Sequence[int]) -> list[int]:
    """Ids of those that stay whole, in DeepSpeed's order: registration."""
    zero, total, found = settings.zero_optimization, 0, []
    for index, numel in enumerate(numels):
        small = numel <= zero.stage3_param_persistence_threshold
        if small and total + numel <= zero.stage3_model_persistence_threshold:
            total += numel
            found.append(index)
    return found


def _tree(model: nn.Module, index: dict[int, int]) -> list[tuple[int, list[int]]]:
    """Each module's parent and own parameters, a parent before its children."""
    place: dict[str, int] = {}
    tree = []
    for number, (name, module) in enumerate(model.named_modules()):
        place[name] = number
        parent = place[name.rpartition(".")[0]] if name else -1
        own = [index[id(p)] for p in module._parameters.values() if id(p) in index]
        tree.append((parent, own))
    return tree


def _cap(settings: Config, planned: Sequence[PlannedParameter], cap: Cap) -> int:
    """Elements of a unit: one bucket, and a third of the room where that is given."""
    most = cap.numel(min((member.tensor.itemsize for member in planned), default=1))
    room = settings.zero_optimization.stage3_max_live_parameters
    return most if room is None else max(1, min(most, room // 3))
