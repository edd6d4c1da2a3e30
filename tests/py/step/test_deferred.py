"""Reductions that come behind backwards: `coalesce_grad_reduction`, `allreduce_gradients`, and
windows that the caller ends. Each scenario runs on two ranks at every stage; the weights are minus
the mean of the ranks' sums (see `Terms`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ranks
from breaking import MayBreak
from catching import assert_told, caught
from scenarios import Scenario, run_each, scenarios_of
from terms import engine_over_terms, step_with, weights
from training import keep
from zerort.errors import StepError

pytestmark = pytest.mark.timeout(120)


def engine_of(**config: Any) -> Any:
    gas = config.pop("gas", 1)
    engine = engine_over_terms(config, accumulation=gas)
    keep(engine)
    return engine


def passes(engine: Any) -> int:
    """Of the window under way."""
    return int(engine._parts.reduction.passes)


# coalesce_grad_reduction


def backwards_in_it_are_reduced_in_one_pass(rank: int) -> None:
    engine = engine_of()
    with engine.coalesce_grad_reduction():
        for value in (1.0, 2.0, 3.0):
            engine.backward(engine(value, value * (rank + 1)))
            assert passes(engine) == 0
    assert passes(engine) == 1
    engine.step()
    assert weights(engine) == (-6.0, -9.0)
    assert step_with(engine, 1.0, 2.0) == (-7.0, -11.0)
    with engine.coalesce_grad_reduction():
        engine.backward(engine(1.0, 1.0))
        engine(2.0, 2.0).backward()
    engine.step()
    assert weights(engine) == (-10.0, -14.0)
    assert engine.global_steps == 3 and engine.micro_steps == 3


def off_the_boundary_nothing_more_is_reduced_than_usually(rank: int) -> None:
    engine = engine_of(gas=2)
    every = engine.zero_optimization_partition_gradients()
    with engine.coalesce_grad_reduction():
        engine.backward(engine(2.0, 2.0))
    assert passes(engine) == every
    engine.step()
    with engine.coalesce_grad_reduction():
        engine.backward(engine(4.0, 2.0))
        engine.backward(engine(4.0, 2.0))
    assert passes(engine) == 1 + every
    engine.step()
    assert weights(engine) == (-5.0, -3.0)


def a_step_in_it_and_another_context_are_refused(rank: int) -> None:
    engine = engine_of()
    with engine.coalesce_grad_reduction():
        engine.backward(engine(1.0, 1.0))
        assert_told(caught(engine.step), StepError, "inside coalesce")
        assert_told(caught(engine.allreduce_gradients), StepError, "inside no_sync()")
        with (
            pytest.raises(StepError, match=r"inside no_sync\(\) or itself"),
            engine.coalesce_grad_reduction(),
        ):
            pass
        with engine.no_sync():
            engine.backward(engine(1.0, 1.0))
    engine.step()
    assert weights(engine) == (-2.0, -2.0)
    with (
        engine.no_sync(),
        pytest.raises(StepError, match=r"inside no_sync\(\) or itself"),
        engine.coalesce_grad_reduction(),
    ):
        pass


def failing(rank: int, engine: Any, breaks: Callable[[], Any], kind: type[BaseException]) -> None:
    """A block that rank 1 breaks after its first backward: no rank steps, and the next one is
    whole.
    """
    try:
        with engine.coalesce_grad_reduction():
            engine.backward(engine(1.0, 1.0))
            if rank == 1:
                breaks()
            engine.backward(engine(1.0, 1.0))
        raised: BaseException | None = None
    except kind as error:
        raised = error
    assert (raised is not None) is (rank == 1)
    error = caught(engine.step)
    if rank == 0:
        assert_told(error, StepError, "rank 1: ", kind.__name__)
    else:
        assert error is None  # the step that belongs to it is void
    assert weights(engine) == (0.0, 0.0)
    with engine.coalesce_grad_reduction():
        engine.backward(engine(1.0 + rank, 2.0))
    engine.step()
    assert weights(engine) == (-1.5, -2.0)


def _interrupt() -> None:
    raise KeyboardInterrupt("Ctrl-C")


def an_exception_of_the_users_that_leaves_it_fails_the_micro_batch(rank: int) -> None:
    failing(rank, engine_of(), lambda: 1 / 0, ZeroDivisionError)


def ctrl_c_that_leaves_it_fails_the_micro_batch(rank: int) -> None:
    failing(rank, engine_of(), _interrupt, KeyboardInterrupt)


def a_backward_that_raises_in_it_fails_the_micro_batch(rank: int) -> None:
    engine = engine_of()
    failing(rank, engine, lambda: engine.backward(torch.ones(())), StepError)


def off_the_boundary_a_failure_in_it_waits_for_the_vote(rank: int) -> None:
    engine = engine_of(gas=2)
    error = None
    try:
        with engine.coalesce_grad_reduction():
            engine.backward(engine(1.0, 1.0))
            if rank == 1:
                raise ValueError("mine")
    except ValueError as raised:
        error = raised
    assert (error is not None) is (rank == 1)
    engine.step()
    engine.backward(engine(1.0, 1.0))
    assert_told(caught(engine.step), StepError, "rank 1: ValueError: mine")
    for _ in range(2):
        engine.backward(engine(2.0, 4.0))
        engine.step()
    assert weights(engine) == (-2.0, -4.0)


def a_backward_that_raises_and_is_caught_in_it_makes_its_step_void(rank: int) -> None:
    engine = engine_of()
    with engine.coalesce_grad_reduction():
        engine.backward(engine(1.0, 1.0))
        if rank == 1:
            assert caught(lambda: engine.backward(torch.ones(2))) is not None
    error = caught(engine.step)
    assert (error is None) is (rank == 1)
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


def one_without_a_backward_has_nothing_to_reduce(rank: int) -> None:
    engine = engine_of()
    with engine.coalesce_grad_reduction():
        pass
    assert passes(engine) == engine.micro_steps == 0
    engine.backward(engine(1.0 + rank, 2.0))
    with engine.coalesce_grad_reduction():
        pass
    engine.step()
    assert weights(engine) == (-1.5, -2.0)


def one_without_a_backward_on_one_rank_is_a_step_without_one(rank: int) -> None:
    engine = engine_of()
    with engine.coalesce_grad_reduction():
        if rank == 0:
            engine.backward(engine(1.0, 1.0))
    whose = "" if rank else "rank 1: "
    assert_told(caught(engine.step), StepError, whose, "step() without backward()")
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


def a_direct_backward_that_raises_in_it_is_found(rank: int) -> None:
    engine = engine_over_terms(model=MayBreak())
    keep(engine)
    error = None
    try:
        with engine.coalesce_grad_reduction():
            engine.backward(engine(1.0, 1.0))
            loss = engine(1.0, 1.0, breaks=rank == 1)
            assert isinstance(caught(loss.backward), ArithmeticError) is (rank == 1)
    except StepError as raised:
        error = raised
    if rank == 1:
        assert_told(error, StepError, "a direct loss.backward() raised")
    assert (error is None) is (rank == 0)
    told = caught(engine.step)
    if rank == 0:
        assert_told(told, StepError, "rank 1: ", "a direct loss.backward() raised")
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


# allreduce_gradients


def what_waits_is_reduced_on_request_and_once(rank: int) -> None:
    engine = engine_of()
    engine.allreduce_gradients()
    assert passes(engine) == 0
    with engine.no_sync():
        engine.backward(engine(1.0 + rank, 1.0))
    assert passes(engine) == 0
    engine.allreduce_gradients(bucket_size=1)
    engine.allreduce_gradients()
    assert passes(engine) == 1
    engine.step()
    assert weights(engine) == (-1.5, -1.0)
    engine.backward(engine(1.0, 1.0))
    engine.allreduce_gradients()
    assert passes(engine) == 1
    engine.step()
    assert weights(engine) == (-2.5, -2.0)


def off_the_boundary_a_stage_that_reduces_at_it_waits(rank: int) -> None:
    engine = engine_of(gas=2)
    with engine.no_sync():
        engine.backward(engine(2.0, 2.0))
    engine.allreduce_gradients()
    assert passes(engine) == engine.zero_optimization_partition_gradients()
    engine.step()
    assert step_with(engine, 4.0, 2.0) == (-3.0, -2.0)


# Windows that the caller ends


def every_step_ends_a_window_of_as_many_backwards_as_there_were(rank: int) -> None:
    engine = engine_of(managed_gradient_accumulation=False, gas=2)
    assert engine.managed_gradient_accumulation() is False
    every = engine.zero_optimization_partition_gradients()
    for count in (1, 3, 2):
        before = weights(engine)
        for index in range(count):
            assert not engine.is_gradient_accumulation_boundary()
            engine.backward(engine(2.0, 4.0 * rank))
            assert passes(engine) == (index + 1 if every else 0)
        engine.step()
        assert engine.was_step_applied()
        assert weights(engine) == (before[0] - count, before[1] - count)
    assert (engine.global_steps, engine.micro_steps) == (3, 3)
    assert engine.global_samples == 6 * 2


def what_is_not_managed_refuses_what_ends_windows_elsewhere(rank: int) -> None:
    engine = engine_of(managed_gradient_accumulation=False)
    for call in (
        lambda: engine.set_gradient_accumulation_boundary(True),
        lambda: engine.coalesce_grad_reduction().__enter__(),
        lambda: engine.join().__enter__(),
    ):
        assert_told(caught(call), StepError, '"managed_gradient_accumulation": false')
    engine.allreduce_gradients()
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


def a_backward_that_raises_leaves_the_step_to_tell_all(rank: int) -> None:
    engine = engine_of(managed_gradient_accumulation=False)
    engine.backward(engine(1.0, 1.0))
    if rank == 0:
        engine.backward(engine(1.0, 1.0))
    else:
        engine(1.0, 1.0)
        assert caught(lambda: engine.backward(torch.ones(()))) is not None
    assert_told(caught(engine.step), StepError, "rank 1: StepError: the loss has no graph")
    assert weights(engine) == (0.0, 0.0)
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)
    with torch.inference_mode(rank == 1):
        engine_step = caught(lambda: _step_only(engine, rank))
    assert_told(engine_step, StepError, "inference_mode")
    assert step_with(engine, 1.0, 2.0) == (-2.0, -4.0)


def _step_only(engine: Any, rank: int) -> None:
    with torch.inference_mode(False):
        engine.backward(engine(1.0, 1.0))
    engine.step()


def a_step_without_a_backward_fails_on_all(rank: int) -> None:
    engine = engine_of(managed_gradient_accumulation=False)
    if rank == 0:
        engine.backward(engine(1.0, 1.0))
    assert_told(caught(engine.step), StepError)
    assert weights(engine) == (0.0, 0.0)
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


def gradients_may_come_directly_where_the_caller_ends_windows(rank: int) -> None:
    engine = engine_of(managed_gradient_accumulation=False)
    for value in (1.0, 2.0):
        engine(value, value).backward()
    engine.step()
    assert weights(engine) == (-3.0, -3.0)


SCENARIOS = scenarios_of(globals())


@ranks.once(None)
def results(stage: int) -> list[dict[str, str]]:
    return ranks.run(2, run_each, stage, SCENARIOS, False)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda found: found.__name__)
def test_at_every_stage(scenario: Scenario, stage: int) -> None:
    for rank, found in enumerate(results(stage)):
        assert scenario.__name__ not in found, f"rank {rank}: {found[scenario.__name__]}"
