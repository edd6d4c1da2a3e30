"""Frozen parameters that no optimizer has are sharded at stage 3 like the others, and cost their
values alone.
"""

from __future__ import annotations

from typing import Any

import pytest

import adapters
import ranks
from adapters import assert_same, engine_over, is_held, made, settings
from training import keep

EVERYTHING = 10**9

WAYS: dict[str, dict[str, Any]] = {
    "stage_0": settings(0),
    "stage_2": settings(2),
    "one_unit": settings(3, room=1, cap=1),
    "some_units": settings(3, room=1500),
    "everything": settings(3, room=EVERYTHING),
    "one_bucket": settings(3, cap=EVERYTHING),
    # Adapters are whole then, and the larger ones of the base are not.
    "only_the_base": {
        **settings(3),
        "zero_optimization": {
            **settings(3)["zero_optimization"],
            "stage3_param_persistence_threshold": 32,
        },
    },
}


def trained_each_way(rank: int, world: int, accumulation: int) -> dict[str, list[Any]]:
    found = {}
    for way, config in WAYS.items():
        model = made()
        engine = engine_over(model, {**config, "gradient_accumulation_steps": accumulation})
        keep(engine)
        frozen = [p for p in model.parameters() if not p.requires_grad and p.numel() > 32]
        assert all(map(is_held, frozen)) == ("stage" not in way), way
        found[way] = adapters.train(engine, rank, steps=3 * accumulation)
        assert all(map(is_held, frozen)) == ("stage" not in way), way
    return found


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_a_base_that_is_sharded_changes_no_bit(world: int, accumulation: int) -> None:
    for found in ranks.run(world, trained_each_way, accumulation):
        truth = found.pop("stage_2")
        if accumulation > 1:
            found.pop("stage_0")  # sums micro-batches before it reduces them
        for way, other in found.items():
            assert truth[0] == other[0], way
            assert_same(truth, other)
