"""What of each parameter no border between shards may cut, and what its update costs its owner.

What follows the optimizer is asked of it before the plan is made, and of the plan before memory
moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from zerort import _core
from zerort.errors import ConfigError
from zerort.memory import PlannedParameter
from zerort.optim import Abilities, members_of
from zerort.optim.muon import flops, is_muon

__all__ = ["Grains", "grains_of", "refuse_cut"]

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


def refuse_cut(
    plan: _core.Plan, names: Sequence[str], replanned: Callable[[float], _core.Plan]
) -> None:
    """Raises `ConfigError` where whole parameters do not fit into equal shards, with what would
    let them; `replanned` makes the plan for another padding.
    """
    if all(bucket.way != "exchanged" for bucket in plan.buckets):
        return
    loose = {min(bucket.params): bucket for bucket in replanned(_ANY).buckets}
    needed = {
        bucket.id: loose[min(bucket.params)].numel / bucket.numel - 1
        for bucket in plan.buckets
        if bucket.way == "exchanged"
    }
    worst = max(needed, key=lambda id: needed[id])
    bucket, most = plan.buckets[worst], math.ceil(100 * needed[worst]) / 100
    numel, param = max(zip(bucket.numels, bucket.params, strict=True))
    raise ConfigError(
        f"the optimizer looks at whole parameters, which {len(needed)} of {len(plan.buckets)} "
        f"buckets cannot hold uncut in {plan.world} equal shards without growing by more than "
        f"zerort.whole_padding allows: bucket {worst}, of {len(bucket.params)} parameters and "
        f"{bucket.numel} elements, the largest {names[param]} of {numel}, would grow by "
        f"{needed[worst]:.0%}. Give larger buckets, which pack better "
        f"(zero_optimization.reduce_bucket_size), or zerort.whole_padding: {most:g}, or use "
        "zero_optimization.stage 0"
    )


_ANY = 1000.0
"""A padding under which every parameter can have a shard alone."""
