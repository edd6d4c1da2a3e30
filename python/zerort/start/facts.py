"""What the head of a trace says of its run: what a reader of the file cannot see in its events."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence

from zerort import _core
from zerort.config import Batch, Config
from zerort.mesh import Control, Mesh
from zerort.start import first
from zerort.trace import Arg

__all__ = ["facts_of", "name_of_run"]


def name_of_run(control: Control) -> str:
    """A word that all ranks of this start have, and those of no other."""
    return first(control, lambda: uuid.uuid4().hex[:12])


def facts_of(
    run: str, settings: Config, batch: Batch, mesh: Mesh, plan: _core.Plan, names: Sequence[str]
) -> Mapping[str, Arg]:
    """By name: words and counts. `names` are those of the plan's parameters."""
    return {
        "name": run,
        "world": mesh.world,
        "host": platform.node(),
        "device": mesh.device.type,
        "stage": settings.zero_optimization.stage,
        "micro_batches": batch.accumulation,
        "window": plan.window,
        "publish": settings.zerort.publish,
        **dict(_contents(plan, names)),
    }


def _contents(plan: _core.Plan, names: Sequence[str]) -> Iterator[tuple[str, Arg]]:
    for bucket in plan.buckets:
        yield f"bucket {bucket.id}", _ends([names[param] for param in bucket.params])
    for unit in plan.units:
        params = [param for bucket in unit.buckets for param in plan.buckets[bucket].params]
        yield f"unit {unit.id}", _ends([names[param] for param in params])


def _ends(names: Sequence[str]) -> str:
    """The first and the last, as errors name a bucket."""
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
