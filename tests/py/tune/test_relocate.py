"""A model gets other buckets between its first sums and its first update, and goes on as if it had
begun with them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ranks
import zerort
from reference import History, Moment
from training import (
    TABLE,
    at_stage,
    config_of,
    digest,
    engine_for,
    keep,
    take_step,
    weights,
)
from zerort.config import load
from zerort.tune.relocate import refusal, relocate

BEGUN, CHOSEN = 16, 1000
"""Elements of a bucket."""
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
CASES = [
    ("gpt_clipped", {}, 2),
    ("groups_with_adamw", {}, 1),
    ("frozen_then_unfrozen_with_adamw", {}, 1),
    ("another_used_on_each_rank", {}, 2),
    ("odd_shapes_with_adamw", {}, 1),
    ("mlp", BF16, 1),
]
MORE = [
    ("mlp", {}, 1),
    ("tied", {}, 1),
    ("frozen_with_decay", {}, 1),
    ("unused_on_one_rank", {}, 1),
    ("reused_checkpointed_reentrant", {}, 1),
    ("two_backwards", {}, 1),
    ("direct", {}, 2),
    ("held_in_no_sync", {}, 2),
    ("mixed_dtypes", {}, 1),
    ("adagrad", {}, 1),
    ("scheduled", {}, 1),
    ("mlp", {**BF16, "communication_data_type": "fp32"}, 2),
    ("mlp", FP16, 2),
]


def move_at_the_first_boundary(engine: Any, config: Any) -> None:
    """As soon as the first window's sums are there."""
    part, parts = engine._transaction.part, engine._parts
    meet = part.meet

    def met() -> None:
        meet()
        part.meet = meet
        assert refusal(parts) is None
        before = parts.reduction.plan
        relocate(parts, parts.relocation.plan_of(load(config), None))
        assert len(parts.reduction.plan.buckets) < len(before.buckets)

    part.meet = met


def histories(rank: int, world: int, cases: list[Any]) -> list[Any]:
    """By case, digests of the run that moves and of the one that began there."""
    found = []
    for name, changes, accumulation, stage in cases:
        case, both = TABLE[name], []
        chosen = config_of(
            case, accumulation, {**at_stage(stage, reduce_bucket_size=CHOSEN), **changes}
        )
        small = config_of(
            case, accumulation, {**at_stage(stage, reduce_bucket_size=BEGUN), **changes}
        )
        for moves in (True, False):
            engine = engine_for(case, small if moves else chosen)
            if moves:
                move_at_the_first_boundary(engine, chosen)
            history = History()
            for step in range(case.steps):
                case.before(engine.module, step)
                take_step(engine, case, rank, step, accumulation)
                history.weights.append(weights(engine))
                history.norms.append(float(engine.get_global_grad_norm()))
            both.append((digest(history), engine._parts.reduction.plan.digest))
            keep(engine)
        found.append(both)
    return found


def compare(stage: int, chosen: list[Any]) -> None:
    cases = [(name, changes, accumulation, stage) for name, changes, accumulation in chosen]
    first, second = ranks.shared(2, histories, cases, timeout=240)
    for case, here, there in zip(cases, first, second, strict=True):
        assert here == there, case
        moved, began = here
        assert moved == began, case


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_that_moves_is_one_that_began_there(stage: int) -> None:
    compare(stage, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_so_is_one_in_all_ways_of_using_an_engine(stage: int) -> None:
    compare(stage, MORE if stage != 1 else CASES + MORE)


def one_window(rank: int, *, moves: bool, changes: Any, before: Any) -> Any:
    case = TABLE["mlp"]
    size = BEGUN if moves else CHOSEN
    config = config_of(case, 1, {**at_stage(2, reduce_bucket_size=size), **changes})
    engine = engine_for(case, config)
    before(engine)
    if moves:
        there = {**at_stage(2, reduce_bucket_size=CHOSEN), **changes}
        move_at_the_first_boundary(engine, config_of(case, 1, there))
    keep(engine)
    return case, engine


def masters_that_are_no_cast(rank: int, world: int) -> Any:
    """What `zerort.utils` has written into masters is more than the parameters show."""
    found = []
    for moves in (True, False):

        def write(engine: Any) -> None:
            for parameter in engine.module.parameters():
                value = torch.full(parameter.shape, 1.0 + 2.0**-20)
                zerort.utils.safe_set_full_fp32_param(parameter, value)

        case, engine = one_window(rank, moves=moves, changes=BF16, before=write)
        take_step(engine, case, rank, 0)
        parameters = list(engine.module.parameters())
        found.append([zerort.utils.safe_get_full_fp32_param(p) for p in parameters])
    return all(map(torch.equal, *found))


def test_masters_keep_what_parameters_do_not_show() -> None:
    assert ranks.shared(2, masters_that_are_no_cast) == [True, True]


def writes_and_hooks(rank: int, world: int) -> Any:
    """Parameters are written through `.data`, have hooks of the user's, and a compiled module."""
    found, heard = [], []
    for moves in (True, False):

        def change(engine: Any) -> None:
            for parameter in engine.module.parameters():
                parameter.data.mul_(1.5)
            first = next(engine.module.parameters())
            first.register_hook(lambda gradient: gradient * 2)
            first.register_post_accumulate_grad_hook(lambda p: heard.append(p is first))
            engine.module.compile(backend="eager")

        case, engine = one_window(rank, moves=moves, changes=BF16, before=change)
        mine = [id(parameter) for parameter in engine.module.parameters()]
        for step in range(3):
            take_step(engine, case, rank, step)
        assert mine == [id(parameter) for parameter in engine.module.parameters()]
        found.append(list(weights(engine).values()))
    assert heard == [True] * 6
    return all(map(torch.equal, *found))


def test_writes_hooks_and_a_compiled_module_stay_as_they_are() -> None:
    assert ranks.shared(2, writes_and_hooks) == [True, True]


def tools_and_checkpoints(rank: int, world: int, folder: str) -> Any:
    """What looks into an engine's memory finds the new one; what it saves loads anywhere."""
    case, engine = one_window(rank, moves=True, changes={}, before=lambda engine: None)
    case.micro(engine, Moment(rank, 0, 0))
    first = next(engine.module.parameters())
    engine.step()
    case.micro(engine, Moment(rank, 1, 0))
    gradient = zerort.utils.safe_get_full_grad(first)
    engine.step()
    master = zerort.utils.safe_get_full_fp32_param(first)
    assert gradient.shape == first.shape and gradient.any()
    assert torch.equal(master, first)
    engine.save_checkpoint(folder, "t")
    _, other = one_window(rank, moves=False, changes={}, before=lambda engine: None)
    other.load_checkpoint(folder, "t")
    for each in (engine, other):
        take_step(each, case, rank, 2)
    return all(map(torch.equal, weights(engine).values(), weights(other).values()))


def test_tools_find_the_new_memory_and_checkpoints_hold_it(tmp_path: Any) -> None:
    assert ranks.shared(2, tools_and_checkpoints, str(tmp_path)) == [True, True]


def refusals(rank: int, world: int) -> list[str | None]:
    case = TABLE["adamw"]
    fresh = engine_for(case, config_of(case, 1, at_stage(1)))
    found = [refusal(fresh._parts)]
    take_step(fresh, case, rank, 0)
    found.append(refusal(fresh._parts))
    sharded = engine_for(case, config_of(case, 1, at_stage(3)))
    found.append(refusal(sharded._parts))
    keep(fresh)
    keep(sharded)
    return found


def test_state_that_there_is_and_sharded_parameters_are_refused() -> None:
    for found in ranks.shared(2, refusals):
        fresh, stepped, sharded = found
        assert fresh is None
        assert stepped == "the optimizer has state already"
        assert "at stage 3" in sharded
