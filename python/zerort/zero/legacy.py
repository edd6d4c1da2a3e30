"""What an engine of stage 3 leaves behind: each rank's shards of one state of its model.

What it guarantees: shards come together only where all of them are of that engine and of the same
state, each on one of the ranks that are there now, whatever their numbers are by now; else all
ranks raise, naming what is missing. What it does not do: it holds no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from zerort.errors import PlanError
from zerort.mesh import Comm

__all__ = ["Legacy", "meet"]


@dataclass(eq=False)
class Legacy:
    """One rank's part in it."""

    engine: str
    """Its name, which all its ranks know it by."""
    rank: int
    """Of its shards, which this rank has."""
    world: int
    """How many there are."""
    state: int
    """How often values had been published."""
    _comm: Comm | None = field(default=None, init=False)
    holders: Sequence[int] = field(default=(), init=False)
    """By shard, the rank of `comm` that has it."""

    @property
    def comm(self) -> Comm:
        """The ranks that have met."""
        assert self._comm is not None, "the ranks have not met"
        return self._comm


def meet(legacies: Sequence[Legacy], comm: Comm) -> None:
    """All ranks, with what all of them have of the same engines, in one order: finds out who has
    which shards. Raises `PlanError` on all.
    """
    if all(legacy._comm is comm for legacy in legacies):
        return
    told = comm.control.gather_objects([(one.rank, one.world, one.state) for one in legacies])
    found = [_holders([views[index] for views in told]) for index in range(len(legacies))]
    for legacy, holders in zip(legacies, found, strict=True):
        legacy._comm, legacy.holders = comm, holders


def _holders(views: Sequence[tuple[int, int, int]]) -> list[int]:
    """`views` are each rank's (shard, shards, state) of one engine."""
    _, world, state = views[0]
    for rank, view in enumerate(views):
        if view[1:] != (world, state):
            raise PlanError(
                "the shards that an engine has left are of two states of the model: rank 0 has "
                f"them behind {state} updates and rank {rank} behind {view[2]}; build the model "
                "anew, and load a checkpoint"
            )
    first: dict[int, int] = {}
    for rank, (shard, _, _) in enumerate(views):
        first.setdefault(shard, rank)
    missing = [shard for shard in range(world) if shard not in first]
    if missing:
        raise PlanError(
            f"an engine of {world} ranks has left the model in as many shards, of which number "
            f"{missing[0]} is on none of the {len(views)} ranks that are here: go on with the "
            "ranks that the engine had, or build the model anew and load a checkpoint"
        )
    return [first[shard] for shard in range(world)]
