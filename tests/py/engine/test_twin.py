"""Cases of the table, trained by the engine and by the naive twin: the weights after every step are
the same. Other numbers of ranks than two, and what no other file trains on two (test_table.py).

The stages of a case are trained one after another in one group; every stage is a test of its own
against the twin.
"""

import pytest

import ranks
from cases import WHOLE
from table import STAGES, reduction
from training import History, assert_same, at_stage, train, train_each, twin_of

FEW = [
    "gpt_clipped",
    "groups_with_adamw",
    "odd_shapes",
    "unused_everywhere",
    "other_order_on_one_rank",
    "retained_graph",
]


@ranks.once(maxsize=1)
def at_every_stage(world: int, name: str, gas: int) -> dict[int, list[History]]:
    """By stage, every rank's history."""
    results = ranks.shared(world, train_each, name, gas, [at_stage(stage) for stage in STAGES])
    return {
        stage: list(histories)
        for stage, histories in zip(STAGES, zip(*results, strict=True), strict=True)
    }


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_of_whole_parameters_trains_like_the_twin_where_it_may_run(
    name: str, gas: int
) -> None:
    assert_same(
        ranks.shared(2, train, name, gas, at_stage(0)), twin_of(name, 2, gas, reduce_at="boundary")
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FEW)
def test_other_numbers_of_ranks_train_like_the_twin(name: str, world: int, stage: int) -> None:
    assert_same(
        at_every_stage(world, name, 2)[stage], twin_of(name, world, 2, reduce_at=reduction(stage))
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_collective_in_backward_pairs_with_its_peer_under_the_smallest_window(stage: int) -> None:
    changes = {**at_stage(stage), "zerort": {"window": 1}}
    histories = ranks.shared(2, train, "collective_in_backward", 2, changes)
    assert_same(histories, twin_of("collective_in_backward", 2, 2, reduce_at=reduction(stage)))


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize(
    "name", ["gpt", "mixed_dtypes", "two_backwards", "another_used_each_micro_batch"]
)
def test_stage_2_that_reduces_at_the_boundary_trains_like_the_twin(name: str, gas: int) -> None:
    changes = {**at_stage(2), "zerort": {"reduce_at": "boundary"}}
    assert_same(
        ranks.shared(2, train, name, gas, changes), twin_of(name, 2, gas, reduce_at="boundary")
    )
