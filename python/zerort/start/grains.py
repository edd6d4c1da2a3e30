"""What of each parameter no border between shards may cut, and what its update costs its owner.

What follows the optimizer is asked of it before the plan is made; how whole parameters reach those
who step them is said once there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from zerort import _core
from zerort.memory import DTYPES, FlatModel, PlannedParameter
from zerort.optim import Abilities, members_of
from zerort.optim.muon import flops, is_muon

__all__ = ["Grains", "grains_of", "log_ways"]

_log = logging.getLogger("zerort")

Grains = tuple["list[_core._Grain] | None", "list[int] | None"]
"""Grain and cost of each parameter."""


def grains_of(
    optimizer: Any, abilities: Sequence[Abilities], planned: Sequence[PlannedParameter]
) -> Grains:
    """Grain and cost of each planned parameter; None where all may be cut anywhere."""
    members = () if optimizer is None else members_of(optimizer)
    owners = [
        (member, index in can.whole)
        for member, can in zip(members, abilities, strict=True)
        for index in range(len(member.param_groups))
    ]
    if not any(whole for _, whole in owners):
        return None, None
    grains: list[_core._Grain] = []
    costs: list[int] = []
    for parameter in planned:
        member, whole = (None, False) if parameter.group is None else owners[parameter.group]
        grains.append("whole" if whole else "element")
        costs.append(_cost(member, parameter) if whole else 0)
    return grains, costs


def _cost(member: Any, parameter: PlannedParameter) -> int:
    """Of its update, in floating-point operations where they are known, else its elements."""
    shape = parameter.form.shape
    if is_muon(member) and len(shape) > 1:
        return flops(shape, int(member.param_groups[0]["ns_steps"]))
    return parameter.tensor.numel()


def log_ways(plan: _core.Plan, flat: FlatModel) -> None:
    """Says how whole parameters reach their owners, what that takes, and how many ranks own any."""
    whole = [bucket for bucket in plan.buckets if bucket.way is not None]
    if not whole:
        return
    owned = [bucket for bucket in whole if bucket.way == "owned"]
    there, back = _exchanged_bytes(plan, flat)
    _log.info(
        "whole parameters: the shards of %d of %d buckets hold them uncut, %d elements in %d; of "
        "the others ranks exchange parts, at a boundary %d bytes of gradients to their owners and "
        "%d bytes of parameters back; %d of %d ranks update them",
        len(owned),
        len(whole),
        sum(sum(bucket.numels) for bucket in owned),
        sum(bucket.numel for bucket in owned),
        there,
        back,
        sum(cost > 0 for cost in plan.costs),
        plan.shards,
    )


def _exchanged_bytes(plan: _core.Plan, flat: FlatModel) -> tuple[int, int]:
    """Of all ranks at a boundary: gradients, and parameters."""
    items = {
        DTYPES[room.dtype]: (room.bucket.accum.tensor.itemsize, room.dtype.itemsize)
        for room in flat.rooms.values()
    }
    there = back = 0
    for rank in range(plan.shards if items else 0):
        for exchange in plan.exchanges(rank):
            sums, values = items[exchange.dtype]
            there += sum(exchange.send_splits) * sums
            back += sum(exchange.recv_splits) * values
    return there, back
