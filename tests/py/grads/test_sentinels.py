"""One hook a bucket once the order is known: who has it, what leaves when, and that no gradient
depends on it.

The lines are explained in `scene`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import ranks
import training
import zerort
from breaking import raises_in_backward
from cases import DRAWN
from catching import assert_told, caught
from scene import ELEMENTS, FORWARD, SWAPPED, VECTORS, Scene, Vectors, both
from training import at_stage, train_all
from zerort.errors import StepError
from zerort.grads.arrivals import Arrivals

NO_WAY_BACK = ArithmeticError("no way back")


# ---- one hook a bucket


def look_at_the_hooks(rank: int, world: int, stage: int, gas: int) -> tuple[list[int], int, int]:
    scene = Scene(stage, gas)
    for _ in range(2 * gas):
        scene.step()
    crossings = sum(
        vector._post_accumulate_grad_hooks is not None for vector in scene.model.vectors
    )
    own = sum(len(vector._backward_hooks or ()) for vector in scene.model.vectors)
    return scene.hooked(), crossings, own


@pytest.mark.parametrize("gas", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_after_two_steps_each_bucket_has_one_hook_and_the_users_are_left(
    stage: int, gas: int
) -> None:
    assert both(look_at_the_hooks, stage, gas) == ([0, 2, 4], 3, VECTORS)


def leave_no_hook_behind(rank: int, world: int, observed: bool) -> list[tuple[Any, bool]]:
    model = Vectors()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config
    )
    for _ in range(2 if observed else 1):
        engine.backward(engine(FORWARD))
        engine.step()
    engine.destroy()
    return [
        (vector._backward_hooks, bool(vector._post_accumulate_grad_hooks))
        for vector in model.vectors
    ]


@pytest.mark.parametrize("observed", [False, True])
def test_destroy_and_the_end_of_observing_take_every_hook_off(observed: bool) -> None:
    assert both(leave_no_hook_behind, observed) == [(None, False)] * VECTORS


def hook_all_for_a_trace(rank: int, world: int, path: str) -> list[int]:
    scene = Scene(zerort={"trace": {"path": path}})
    scene.steps(FORWARD, FORWARD)
    hooked = scene.hooked()
    scene.engine.destroy()
    return hooked


def test_a_trace_is_told_of_every_gradient(tmp_path: Path) -> None:
    assert both(hook_all_for_a_trace, str(tmp_path / "trace-{rank}.json")) == [0, 1, 2, 3, 4, 5]


# ---- what leaves when


def run_steps(
    rank: int,
    world: int,
    orders: list[Sequence[int]],
    stage: int = 2,
    gas: int = 1,
    reentrant: bool = False,
) -> tuple[list[str], list[float], list[int]]:
    scene = Scene(stage, gas, Vectors(reentrant))
    return scene.steps(*orders), scene.uses(), scene.hooked()


OBSERVED = "543210|||"
STEADY = "54|32|10|"


def test_red_2_a_bucket_leaves_right_behind_its_sentinel() -> None:
    lines, uses, _ = both(run_steps, [FORWARD] * 3)
    assert lines == [OBSERVED, STEADY, STEADY]
    assert uses == [3.0] * VECTORS


def test_red_2_a_sentinel_that_comes_first_is_not_believed() -> None:
    lines, uses, hooked = both(run_steps, [FORWARD, FORWARD, SWAPPED, FORWARD])
    assert lines == [OBSERVED, STEADY, "4532||10|", STEADY]
    assert uses == [4.0] * VECTORS
    assert hooked == [0, 2, 4]


SHARDED = {
    "stage": 3,
    "reduce_bucket_size": 2 * ELEMENTS,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 4 * ELEMENTS,
}
"""A unit for each bucket, and room for two of three."""


def run_sharded(
    rank: int, world: int, orders: list[Sequence[int]], direct: bool = False
) -> tuple[list[str], list[float], list[int]]:
    scene = Scene(zero_optimization=SHARDED)
    lines = [scene.step(order, direct=direct) for order in orders]
    with zerort.zero.GatheredParameters(list(scene.model.vectors)):
        return lines, scene.uses(), scene.hooked()


def test_red_2_neither_is_one_where_needs_move_the_list_too() -> None:
    lines, uses, hooked = both(run_sharded, [FORWARD, FORWARD, FORWARD, SWAPPED, FORWARD])
    assert lines == [OBSERVED, STEADY, STEADY, "4532||10|", STEADY]
    assert uses == [5.0] * VECTORS
    assert hooked == [0, 2, 4]


def test_what_a_need_has_overtaken_holds_nothing_up() -> None:
    came, missing = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    came.grad = torch.ones(1)
    flat = SimpleNamespace(buckets=[SimpleNamespace(params=[p]) for p in (missing, came)])
    arrivals = Arrivals(flat)  # type: ignore[arg-type]
    arrivals.begin([("launch", 0), ("need", 1), ("gather", 1), ("launch", 1)])
    assert arrivals.reach(4, place=0) == 0
    assert arrivals.reach(4, place=2) == 4


def test_a_direct_backward_at_stage_3_observes_with_all_hooks() -> None:
    lines, uses, hooked = both(run_sharded, [FORWARD] * 3, True)
    assert lines == [OBSERVED] * 3
    assert uses == [3.0] * VECTORS
    assert hooked == list(FORWARD)


def test_every_rank_has_sentinels_of_its_own() -> None:
    orders = [FORWARD, SWAPPED]
    (ours, uses, hooked), (theirs, others, hooked_there) = ranks.shared(
        2, run_steps_in_own_order, orders
    )
    assert (ours, theirs) == ([OBSERVED, STEADY], ["453210|||", "45|32|10|"])
    assert uses == others == [2.0] * VECTORS
    assert (hooked, hooked_there) == ([0, 2, 4], [0, 2, 5])


def run_steps_in_own_order(
    rank: int, world: int, orders: list[Sequence[int]]
) -> tuple[list[str], list[float], Any]:
    return run_steps(rank, world, [orders[rank]] * 2)


def test_a_new_order_of_all_vectors_costs_time_only() -> None:
    lines, uses, _ = both(run_steps, [FORWARD, FORWARD, (5, 4, 3, 2, 1, 0), FORWARD])
    assert lines == [OBSERVED, STEADY, "012345|||", STEADY]
    assert uses == [4.0] * VECTORS


def swap_at_the_boundary(
    rank: int, world: int, stage: int, direct: bool
) -> tuple[list[str], list[float], list[int]]:
    scene = Scene(stage, gas=2)
    orders = [*[FORWARD] * 5, SWAPPED, *[FORWARD] * 2]
    return [scene.step(order, direct=direct) for order in orders], scene.uses(), scene.hooked()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("stage", [0, 1])
def test_what_an_earlier_micro_batch_has_left_is_no_sign_that_a_gradient_has_come(
    stage: int, direct: bool
) -> None:
    lines, uses, hooked = both(swap_at_the_boundary, stage, direct)
    quiet = "543210"
    assert lines == [quiet, OBSERVED, quiet, STEADY, quiet, "4532||10|", quiet, STEADY]
    assert uses == [4.0] * VECTORS
    assert hooked == [0, 2, 4]


@pytest.mark.parametrize("unused", [4, 5])
def test_a_bucket_without_its_sentinel_or_another_leaves_at_the_end(unused: int) -> None:
    order = [index for index in FORWARD if index != unused]
    lines, uses, hooked = both(run_steps, [FORWARD, FORWARD, order, FORWARD])
    came = "".join(str(index) for index in reversed(order))
    assert lines == [OBSERVED, STEADY, f"{came}|||", STEADY]
    assert uses == [3.0 if index == unused else 4.0 for index in FORWARD]
    assert hooked == [0, 2, 4]


def test_a_bucket_that_was_not_seen_whole_keeps_all_its_hooks() -> None:
    lines, uses, hooked = both(run_steps, [(0, 1, 2, 3, 4), FORWARD, FORWARD])
    assert lines == ["43210|||", "5432|10||", "5432|10||"]  # what was not whole goes last
    assert uses == [3.0] * 5 + [2.0]
    assert hooked == [0, 2, 4, 5]


# ---- late gradients


def late_on_rank_0(
    rank: int, world: int, stage: int
) -> tuple[list[str], list[float], list[int], list[int]]:
    """Vector 5 comes twice before the sentinel; in the third step once before and once after it, on
    rank 0.
    """
    scene = Scene(stage, model=Vectors(reentrant=True))
    twice, apart = (*FORWARD, 5), (0, 1, 2, 3, 5, 4, 5)
    lines = scene.steps(twice, twice)
    before = scene.hooked()
    changed = apart if rank == 0 else twice
    lines += scene.steps(changed, changed, twice)
    return lines, scene.uses(), before, scene.hooked()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_red_3_a_part_behind_its_bucket_is_added_and_all_hooks_come_back_on_all_ranks(
    stage: int,
) -> None:
    observed, steady = "5543210|||", "554|32|10|"
    (ours, uses, before, after), (theirs, others, _, after_there) = ranks.shared(
        2, late_on_rank_0, stage
    )
    assert ours == [observed, steady, "54|532|10||||", "545|32|10|", steady]
    assert theirs == [observed, steady, f"{steady}|||", steady, steady]
    assert uses == others == [5.0] * 5 + [10.0]
    assert before == [0, 2, 4]
    assert after == after_there == list(FORWARD)


def test_red_3_a_vector_that_comes_more_often_than_learnt_is_added() -> None:
    again = (5, *FORWARD)
    lines, uses, hooked = both(run_steps, [FORWARD, FORWARD, again, again, FORWARD], 2, 1, True)
    assert lines == [OBSERVED, STEADY, "54|32|10|5|||", "54|32|10|5|||", STEADY]
    assert uses == [5.0] * 5 + [7.0]
    assert hooked == list(FORWARD)


def test_a_sentinel_that_comes_twice_is_waited_for_twice() -> None:
    twice = (4, *FORWARD)
    lines, uses, _ = both(run_steps, [twice, twice, FORWARD], 2, 1, True)
    assert lines == ["5432104|||", "5432|10|4|", "5432|10||"]
    assert uses == [3.0] * 4 + [5.0, 3.0]


# ---- freezing


def freeze_and_unfreeze(
    rank: int, world: int, index: int
) -> tuple[list[str], list[float], list[list[int]]]:
    scene = Scene()
    lines, hooked = scene.steps(FORWARD, FORWARD), []
    for trains in (False, True):
        scene.model.vectors[index].requires_grad_(trains)
        lines.append(scene.step())
        hooked.append(scene.hooked())
    return lines[2:], scene.uses(), hooked


@pytest.mark.parametrize(
    ("index", "line", "hooked"), [(4, "5|32|10|", [0, 2, 5]), (5, "4|32|10|", [0, 2, 4])]
)
def test_a_frozen_sentinel_is_relieved_and_takes_over_again(
    index: int, line: str, hooked: list[int]
) -> None:
    lines, uses, seen = both(freeze_and_unfreeze, index)
    assert lines == [line, STEADY]
    assert uses == [3.0 if i == index else 4.0 for i in FORWARD]
    assert seen == [hooked, [0, 2, 4]]


def unfreeze_what_is_new(
    rank: int, world: int, direct: bool
) -> tuple[list[str], list[float], list[int]]:
    scene = Scene()
    scene.model.vectors[4].requires_grad_(False)
    lines = scene.steps(FORWARD, FORWARD)
    scene.model.vectors[4].requires_grad_(True)
    lines += [scene.step(direct=direct), scene.step(), scene.step(direct=direct)]
    return lines, scene.uses(), scene.hooked()


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_unfrozen_for_the_first_time_is_observed_with_everything_else(direct: bool) -> None:
    lines, uses, hooked = both(unfreeze_what_is_new, direct)
    assert lines == ["53210|||", "5|32|10|", OBSERVED, STEADY, STEADY]
    assert uses == [5.0] * 4 + [3.0, 5.0]
    assert hooked == [0, 2, 4]


# ---- backwards of the user's own


def go_back_directly(
    rank: int, world: int, orders: list[Sequence[int]], gas: int
) -> tuple[list[str], list[float]]:
    scene = Scene(1, gas)
    lines = [scene.step(order, direct=True) for order in orders]
    return lines, [uses * gas for uses in scene.uses()]


def test_a_direct_backward_is_noticed_at_its_first_sentinel() -> None:
    lines, uses = both(go_back_directly, [FORWARD] * 3, 1)
    assert lines == [OBSERVED, STEADY, STEADY]
    assert uses == [3.0] * VECTORS


def test_a_direct_backward_that_touches_no_sentinel_is_noticed_at_its_end() -> None:
    lines, uses = both(go_back_directly, [FORWARD, FORWARD, (1, 3, 5), FORWARD], 1)
    assert lines == [OBSERVED, STEADY, "531|||", STEADY]
    assert uses == [3.0, 4.0] * 3


def test_so_is_one_that_adds_to_what_an_earlier_micro_batch_has_left() -> None:
    lines, uses = both(go_back_directly, [*[FORWARD] * 5, (1, 3, 5), *[FORWARD] * 2], 2)
    quiet = "543210"
    assert lines == [quiet, OBSERVED, quiet, STEADY, quiet, "531|||", quiet, STEADY]
    assert uses == [7.0, 8.0] * 3


def look_at_slopes_between_micro_batches(
    rank: int, world: int
) -> tuple[int, list[float], list[int]]:
    scene = Scene(1, gas=2)
    scene.steps(*[FORWARD] * 5)
    slopes = torch.autograd.grad(scene.engine(FORWARD), list(scene.model.parameters()))
    assert [float(slope[0]) for slope in slopes] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    scene.step()
    return scene.engine.micro_steps, scene.uses(), scene.hooked()


def test_what_an_earlier_micro_batch_has_left_is_no_sign_of_a_backward() -> None:
    assert both(look_at_slopes_between_micro_batches) == (6, [3.0] * VECTORS, [0, 2, 4])


def go_back_unscaled(rank: int, world: int) -> tuple[Exception | None, list[float], list[float]]:
    two_a_bucket = {
        "stage": 2,
        "reduce_bucket_size": 4 * ELEMENTS,
    }  # 64 bytes apart, which is twice as many elements
    scene = Scene(fp16={"enabled": True, "loss_scale": 4.0}, zero_optimization=two_a_bucket)
    scene.steps(FORWARD, FORWARD)
    assert scene.hooked() == [0, 2, 4]
    error = caught(lambda: scene.engine([1, 3, 5]).backward())
    scene.step()
    refused = scene.uses()
    scene.engine.scale(scene.engine([1, 3, 5])).backward()
    scene.engine.step()
    return error, refused, scene.uses()


def test_an_unscaled_backward_that_touches_no_sentinel_is_refused() -> None:
    for error, refused, after in ranks.shared(2, go_back_unscaled):
        assert_told(error, StepError, "loss-scaled")
        assert refused == [3.0] * VECTORS
        assert after == [3.0, 4.0] * 3


def break_off_on_rank_1(
    rank: int, world: int, steps_anyway: bool
) -> tuple[Exception | None, list[float]]:
    """Its direct backward raises behind vector 5's gradient, before that of any sentinel."""
    scene = Scene()
    scene.steps(FORWARD, FORWARD)
    x = torch.zeros((), requires_grad=True)
    error = caught(
        scene.engine([5], raises_in_backward(x, NO_WAY_BACK) if rank == 1 else x).backward
    )
    assert rank == 0 or [
        i for i, vector in enumerate(scene.model.vectors) if vector.grad is not None
    ] == [5]
    if rank == 0 or steps_anyway:
        error = caught(scene.engine.step)
    scene.step()
    return error, scene.uses()


@pytest.mark.parametrize("steps_anyway", [False, True])
def test_a_direct_backward_that_raises_before_any_sentinel_is_raised_on_all(
    steps_anyway: bool,
) -> None:
    (innocent, after), (culprit, after_there) = ranks.shared(2, break_off_on_rank_1, steps_anyway)
    assert_told(innocent, StepError, "rank 1")
    assert_told(culprit, StepError if steps_anyway else ArithmeticError)
    assert after == after_there == [3.0] * VECTORS


def break_off_and_go_back_again(rank: int, world: int) -> list[float]:
    """The second loss was made before the first one's backward raised; nothing has told the engine
    of that.
    """
    scene = Scene()
    scene.steps(FORWARD, FORWARD)
    broken = scene.engine([5], raises_in_backward(torch.zeros((), requires_grad=True), NO_WAY_BACK))
    whole = scene.engine([1, 3])
    assert_told(caught(broken.backward), ArithmeticError)
    whole.backward()
    assert_told(caught(scene.engine.step), StepError, "raised")
    scene.step()
    return scene.uses()


def test_what_a_raised_backward_has_left_does_not_slip_into_the_next() -> None:
    assert ranks.shared(1, break_off_and_go_back_again) == [[3.0] * VECTORS]


# ---- the same numbers


UNSTEADY = [
    "gpt_clipped",
    "another_unused_each_step",
    "another_used_each_micro_batch",
    "another_used_on_each_rank",
    "other_order_on_one_rank",
    "reused_checkpointed_reentrant",
    "collective_in_backward",
    "two_backwards",
    "gradient_penalty",
    "bypass_direct",
    "direct",
    "frozen_then_unfrozen",
    *DRAWN,
]


def train_both_ways(
    rank: int, world: int, names: list[str], gas: int, stage: int
) -> dict[str, bool]:
    """Whether a case ends with the same bits with sentinels and with a hook on every parameter."""
    engine_for = training.engine_for

    def with_all_hooks(*args: Any) -> Any:
        engine = engine_for(*args)
        engine._parts.reduction.listener.dismiss_sentinels()
        return engine

    same = {}
    for name in names:
        (watched,) = train_all(rank, world, name, gas, [at_stage(stage)])
        with mock.patch.object(training, "engine_for", with_all_hooks):
            same[name] = [watched] == train_all(rank, world, name, gas, [at_stage(stage)])
    return same


@pytest.mark.parametrize(
    ("world", "gas", "stage"),
    [
        *(pytest.param(*at, marks=pytest.mark.slow) for at in ((2, 1, 0), (2, 3, 1))),
        (2, 3, 2),
        pytest.param(3, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_sentinels_change_no_bit(world: int, gas: int, stage: int) -> None:
    for same in ranks.shared(world, train_both_ways, UNSTEADY, gas, stage, timeout=180):
        assert [name for name in UNSTEADY if not same[name]] == []
