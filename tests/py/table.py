"""Cases of the table trained on two ranks, a few in one group of processes, once for all tests.

What a test asks for is trained with its neighbours; where one of them breaks, each is trained
alone, so that a failure is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import ranks
from cases import CASES
from reference import History, ReduceAt
from training import Config, at_stage, train_each

__all__ = [
    "EVERYTHING",
    "FAR_APART",
    "LATE",
    "LATER",
    "REFUSED",
    "SOON",
    "STAGES",
    "Batches",
    "Job",
    "Run",
    "at_stage_3",
    "halved",
    "reduction",
    "trained_in_every_way",
]

STAGES = [0, 1, 2]
EVERYTHING = 10**9
"""Elements of a bucket that is the only one."""

Job = tuple[str, int, list[Config]]
"""A case's name, accumulation steps, and the variants to train."""


class Batches:
    """Histories of `jobs`, trained `size` jobs in one group of `world` processes, each job by
    `train` of its parts.
    """

    def __init__(
        self,
        world: int,
        jobs: Mapping[Any, Job],
        size: int,
        train: Callable[..., list[History]] = train_each,
    ) -> None:
        self._world, self._jobs, self._size = world, dict(jobs), size
        self._train_one = train
        self._found: dict[Hashable, list[list[History]]] = {}

    def __getitem__(self, key: Hashable) -> list[list[History]]:
        """Of each variant, every rank's history. Raises `RankFailure`."""
        if key not in self._found:
            keys = list(self._jobs)
            start = keys.index(key) // self._size * self._size
            try:
                self._train(keys[start : start + self._size])
            except ranks.RankFailure:
                self._size = 1
                self._train([key])
        return self._found[key]

    def _train(self, keys: list[Hashable]) -> None:
        jobs = [self._jobs[key] for key in keys]
        results = ranks.run(self._world, train_jobs, jobs, self._train_one)
        for key, of_ranks in zip(keys, zip(*results, strict=True), strict=True):
            self._found[key] = [list(histories) for histories in zip(*of_ranks, strict=True)]


def train_jobs(
    rank: int, world: int, jobs: list[Job], train: Callable[..., list[History]]
) -> list[list[History]]:
    return [train(rank, world, *job) for job in jobs]


REFUSED = {
    # They differentiate a backward, for which parameters would have to be whole twice.
    "gradient_penalty",
    "hessian_vector_product",
    # They read parameters outside a forward.
    "bypass",
    "bypass_direct",
    # One rank waits in a collective of its own, within a backward, for another that skips a module
    # and so has to ask for the units that the first has passed.
    "collective_in_backward",
}
"""Cases that stage 3 refuses."""

LATE = {
    "reused_more_often_checkpointed_reentrant",
    "another_unused_each_step",
    "unfrozen_after_a_step",
}
"""In these a gradient may come at stage 3 when its bucket has left; the rest is summed later, to
other bits.
"""


def at_stage_3(room: int, bucket: int = 150) -> Config:
    """Everything is sharded, a bucket a unit."""
    return {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": room,
        },
        "zerort": {"reduce_at": "micro_batch"},
    }


def reduction(stage: int) -> ReduceAt:
    """When a stage's gradients are reduced by default."""
    return "micro_batch" if stage >= 2 else "boundary"


def _way(stage: int, bucket: int, window: int | str) -> Config:
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        "zerort": {"window": window, "reduce_at": "boundary"},
    }


FAR_APART: dict[str, Config] = {
    "stage_0-one_bucket-window_1": _way(0, EVERYTHING, 1),
    "stage_1-one_parameter_a_bucket-window_2": _way(1, 1, 2),
    "stage_2-one_bucket-window_all": _way(2, EVERYTHING, "all"),
}
AT_STAGES: dict[int | str, Config] = {stage: at_stage(stage) for stage in STAGES}
WAYS = {1: AT_STAGES, 3: {**AT_STAGES, **FAR_APART}}
"""By accumulation steps."""
Run = tuple[str, int]
"""A case's name, and accumulation steps."""


def halved(names: Iterable[str]) -> tuple[list[Run], list[Run]]:
    """Each case with one micro-batch or three in turn; and each with the other, for slow tests."""
    soon = [(name, (1, 3)[place % 2]) for place, name in enumerate(names)]
    return soon, [(name, 4 - gas) for name, gas in soon]


SOON, LATER = halved(CASES)
_table = Batches(
    2, {(name, gas): (name, gas, list(WAYS[gas].values())) for name, gas in SOON + LATER}, 6
)


def trained_in_every_way(name: str, accumulation: int) -> dict[int | str, list[History]]:
    """By stage and, with 3 accumulation steps, by name of a way: every rank's history."""
    return dict(zip(WAYS[accumulation], _table[name, accumulation], strict=True))
