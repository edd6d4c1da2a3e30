"""Random models, parameters used at random on each rank, random bucket sizes, windows and stages: always the twin."""

import random

import pytest

import ranks
from cases import DRAWN
from training import Config, assert_same, train, twin_of


def draw_config(name: str) -> tuple[int, Config]:
    """(accumulation, changes to the configuration)."""
    draw = random.Random(name)
    changes: Config = {
        "zero_optimization": {"stage": draw.choice([0, 1, 2]), "reduce_bucket_size": draw.choice([1, 40, 150, 700])},
        "zerort": {"window": draw.choice([1, 2, 3, "all"]), "reduce_at": draw.choice(["boundary", None])},
    }
    return draw.choice([1, 2, 4]), changes


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawn_model_trains_like_the_twin(name: str) -> None:
    accumulation, changes = draw_config(name)
    assert_same(ranks.run(2, train, name, accumulation, changes), twin_of(name, 2, accumulation))
