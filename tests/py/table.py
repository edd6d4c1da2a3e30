"""The table of cases trained on two ranks in every way that tests compare: once for all of them.

A group of processes trains a case at the stages, for comparison with the twin, and in ways far
apart, for comparison with one another.
"""

from __future__ import annotations

import ranks
from reference import History
from training import Config, at_stage, train_each

__all__ = ["EVERYTHING", "FAR_APART", "STAGES", "trained_in_every_way"]

STAGES = [0, 1, 2]
EVERYTHING = 10**9
"""Elements of a bucket that is the only one."""


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


@ranks.once(maxsize=None)
def trained_in_every_way(name: str, accumulation: int) -> dict[int | str, list[History]]:
    """By stage and by name of a way, every rank's history."""
    ways = {**{stage: at_stage(stage) for stage in STAGES}, **FAR_APART}
    results = ranks.run(2, train_each, name, accumulation, list(ways.values()))
    return {
        way: list(histories)
        for way, histories in zip(ways, zip(*results, strict=True), strict=True)
    }
