"""Ranks whose passes differ in number: one that has failed where its peers go on to reduce, and
windows that the caller ends after other numbers of backwards. Each scenario runs on two ranks at
every stage, one after another in one process, so that what one leaves behind would break the next;
weights are minus the mean of the ranks' sums (see `Terms`).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import ranks
from breaking import MayBreak
from catching import assert_told, caught
from scenarios import Scenario, run_each, scenarios_of
from terms import DEFAULTS, engine_over_terms, step_with, weights
from training import keep
from zerort.errors import StepError

pytestmark = pytest.mark.timeout(120)

PATIENCE = 15
"""Seconds, after which ranks that have parted say so."""


MINE = ArithmeticError("the user's own")


def engine_of(**config: Any) -> Any:
    gas = config.pop("gas", 1)
    zerort = {"timeout": PATIENCE, **config.pop("zerort", {})}
    engine = engine_over_terms({**config, "zerort": zerort}, gas, model=MayBreak())
    keep(engine)
    return engine


def fails(
    engine: Any, rank: int, error: BaseException = MINE, culprits: tuple[int, ...] = (1,)
) -> bool:
    """A backward within `no_sync`, which raises on the culprits; whether it did."""
    broken = rank in culprits
    try:
        with engine.no_sync():
            engine.backward(engine(64.0, 64.0, error if broken else None))
    except type(error):
        return True
    assert not broken
    return False


def ends(engine: Any, rank: int, failed: bool, why: str = "rank 1: ArithmeticError") -> None:
    """The step of the failed micro-batch, and clean ones. The culprit has waited for long enough by
    then to be in a pass that nobody else will begin.
    """
    if not failed:
        time.sleep(0.1)
    told = caught(engine.step)
    if failed:
        assert told is None, repr(told)  # the step that belongs to it is void
    else:
        assert_told(told, StepError, why, "the user's own")
    assert weights(engine) == (0.0, 0.0)
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)
    assert step_with(engine, 1.0 + rank, 2.0) == (-2.5, -4.0)


# A failure within `no_sync`


def a_failure_in_no_sync_while_the_others_go_on_to_reduce(rank: int) -> None:
    for how in ({}, {"zerort": {"window": 1}}, {"zerort": {"wire": "fp16"}}):
        engine = engine_of(**how)
        failed = fails(engine, rank)
        if not failed:
            engine.backward(engine(1.0, 1.0))
        ends(engine, rank, failed)


def a_failure_in_no_sync_while_the_others_reduce_on_request(rank: int) -> None:
    engine = engine_of()
    failed = fails(engine, rank)
    if not failed:
        engine.allreduce_gradients()
        with engine.no_sync():
            engine.backward(engine(1.0, 1.0))
        engine.allreduce_gradients()
    ends(engine, rank, failed)


def a_failure_in_no_sync_while_the_others_step(rank: int) -> None:
    engine = engine_of()
    ends(engine, rank, fails(engine, rank))


def failures_in_no_sync_on_all(rank: int) -> None:
    engine = engine_of()
    assert fails(engine, rank, culprits=(0, 1))
    ends(engine, rank, failed=True)


def ctrl_c_in_no_sync(rank: int) -> None:
    engine = engine_of()
    failed = fails(engine, rank, KeyboardInterrupt("the user's own"))
    if not failed:
        engine.backward(engine(1.0, 1.0))
    ends(engine, rank, failed, "rank 1: KeyboardInterrupt")


def a_direct_backward_in_no_sync_that_raises(rank: int) -> None:
    engine = engine_of()
    with engine.no_sync():
        loss = engine(64.0, 64.0, MINE if rank == 1 else None)
        assert (caught(loss.backward) is not None) is (rank == 1)
    if rank == 0:
        engine(1.0, 1.0).backward()
        assert_told(caught(engine.step), StepError, "rank 1: a direct loss.backward() raised")
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)  # the first that rank 1's engine hears
    assert step_with(engine, 1.0 + rank, 2.0) == (-2.5, -4.0)


def a_direct_backward_in_no_sync_that_raises_while_the_others_step(rank: int) -> None:
    engine = engine_of()
    with engine.no_sync():
        loss = engine(64.0, 64.0, MINE if rank == 1 else None)
        assert (caught(loss.backward) is not None) is (rank == 1)
    assert_told(caught(engine.step), StepError, "a direct loss.backward() raised")
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)
    assert step_with(engine, 1.0 + rank, 2.0) == (-2.5, -4.0)


def a_step_without_a_backward_while_the_others_hold_theirs(rank: int) -> None:
    engine = engine_of()
    if rank == 0:
        with engine.no_sync():
            engine.backward(engine(1.0, 1.0))
    told = caught(engine.step)
    assert_told(told, StepError, "step() without backward() in this micro-batch")
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)
    assert step_with(engine, 1.0 + rank, 2.0) == (-2.5, -4.0)


def a_failure_in_no_sync_early_in_a_window(rank: int) -> None:
    engine = engine_of(gas=2)
    failed = fails(engine, rank)
    if not failed:
        engine.backward(engine(1.0, 1.0))
    engine.step()
    engine.backward(engine(1.0, 1.0))
    assert_told(caught(engine.step), StepError, "rank 1: ArithmeticError: the user's own")
    assert weights(engine) == (0.0, 0.0)
    for _ in range(2):
        engine.backward(engine(2.0, 4.0))
        engine.step()
    assert weights(engine) == (-2.0, -4.0)


def the_first_of_several_reduced_backwards_raises(rank: int) -> None:
    engine = engine_of()
    failed = rank == 1
    if failed:
        assert caught(lambda: engine.backward(engine(1.0, 1.0, MINE))) is not None
    else:
        for _ in range(3):
            engine.backward(engine(1.0, 1.0))
    ends(engine, rank, failed)


def a_failure_in_no_sync_where_features_meet_before_the_vote(rank: int) -> None:
    section = {"enabled": True, "layer_name": "blocks", "layer_num": 1}
    if DEFAULTS["stage"] == 3:
        return
    model = MayBreak()
    model.blocks = torch.nn.ModuleList([torch.nn.ParameterList([])])  # what they are of
    model.blocks[0].append(model.a)
    config = {"eigenvalue": section, "zerort": {"timeout": PATIENCE}}
    engine = engine_over_terms(config, model=model)
    keep(engine)
    failed = fails(engine, rank)
    if not failed:
        engine.backward(engine(1.0, 1.0))
    ends(engine, rank, failed)


# Windows that the caller ends


def windows_of_other_numbers_of_backwards(rank: int) -> None:
    engine = engine_of(managed_gradient_accumulation=False)
    expected = [0.0, 0.0]

    def take(backwards: int) -> None:
        for _ in range(backwards):
            engine.backward(engine(2.0, 4.0))
        engine.step()

    for here in [(1, 3), (2, 2), (3, 1), (1, 1)]:
        told = caught(lambda here=here: take(here[rank]))
        if DEFAULTS["stage"] == 3 and here[0] != here[1]:
            assert_told(told, StepError, "ranks are at different places")
            continue
        assert told is None, repr(told)
        expected = [
            old - each * sum(here) / 2 for old, each in zip(expected, (2.0, 4.0), strict=True)
        ]
        assert list(weights(engine)) == expected


def what_waits_in_a_shorter_window_is_taken_along(rank: int) -> None:
    if DEFAULTS["stage"] == 3:
        return
    engine = engine_of(managed_gradient_accumulation=False)
    with engine.no_sync():
        engine.backward(engine(2.0, 2.0))
    if rank == 0:
        engine.backward(engine(2.0, 4.0))
    engine.step()
    assert weights(engine) == (-3.0, -4.0)
    assert step_with(engine, 1.0, 2.0) == (-4.0, -6.0)


def a_window_without_a_backward_on_one_rank_fails_on_all(rank: int) -> None:
    engine = engine_of(managed_gradient_accumulation=False)
    if rank == 0:
        engine.backward(engine(1.0, 1.0))
    assert_told(caught(engine.step), StepError, "step() without backward()")
    assert weights(engine) == (0.0, 0.0)
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


def a_failure_in_one_of_other_numbers_of_backwards(rank: int) -> None:
    if DEFAULTS["stage"] == 3:
        return
    engine = engine_of(managed_gradient_accumulation=False)
    for index in range(3):
        error = MINE if rank == 1 and index == 1 else None
        if caught(lambda error=error: engine.backward(engine(1.0, 1.0, error))) is not None:
            break
    assert_told(caught(engine.step), StepError, "rank 1: ArithmeticError: the user's own")
    assert weights(engine) == (0.0, 0.0)
    assert fails(engine, rank) is (rank == 1)
    for _ in range(1 - rank):
        engine.backward(engine(1.0, 1.0))
    assert_told(caught(engine.step), StepError, "rank 1: ArithmeticError: the user's own")
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


SCENARIOS = scenarios_of(globals())


@ranks.once(None)
def results(stage: int) -> list[dict[str, str]]:
    return ranks.run(2, run_each, stage, SCENARIOS, True, timeout=110)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda found: found.__name__)
def test_at_every_stage(scenario: Scenario, stage: int) -> None:
    for rank, found in enumerate(results(stage)):
        assert scenario.__name__ not in found, f"rank {rank}: {found[scenario.__name__]}"
