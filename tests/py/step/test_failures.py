"""What can go wrong, on one rank or on all: an error that names it, on every rank, within a time
limit, and an engine that goes on with right answers.

A scenario returns, per rank, the errors it caught; then it takes a clean step and returns the
weights too. Weights are minus the mean gradient (see `Terms`): whatever an aborted step left behind
would show.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import zerort
from breaking import MayBreak
from catching import assert_told, caught
from logged import log_lines
from models import Terms
from terms import Weights, engine_over_terms, step_with, weights
from training import at_stage
from zerort.errors import CommError, NonFiniteGradient, PlanMismatch, StepError, ZerortError

pytestmark = pytest.mark.timeout(120)
every_stage = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
whole_and_sharded = pytest.mark.parametrize("stage", [0, 3])

LIMIT = 30.0  # seconds a scenario may take, start included
NAN = float("nan")
CLEAN = (-2.0, -4.0)

Story = tuple[Exception | None, Weights]


def then_a_clean_step(engine: Any, call: Callable[[], Any]) -> Story:
    """The error of a call, and the weights after a step that has nothing to do with it."""
    return caught(call), step_with(engine, 2.0, 4.0)


# ---- a step that one rank cannot complete


def _break_on_rank_1(rank: int, world: int, stage: int, accumulation: int) -> list[Story]:
    engine = engine_over_terms(at_stage(stage), accumulation, model=MayBreak())

    def take_window() -> None:
        for micro in range(accumulation):
            broken = rank == 1 and micro == accumulation - 1
            engine.backward(engine(64.0, 64.0, breaks=broken))
            engine.step()

    error = caught(take_window)
    for _ in range(accumulation):
        after = step_with(engine, 2.0, 4.0)
    return [(error, after)]


@every_stage
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_exception_in_one_ranks_backward_is_raised_on_all(stage: int, accumulation: int) -> None:
    (innocent, culprit) = (
        story[0] for story in ranks.shared(2, _break_on_rank_1, stage, accumulation, timeout=LIMIT)
    )
    assert_told(innocent[0], StepError, "rank 1", "the user's own backward")
    assert_told(culprit[0], ArithmeticError, "the user's own backward")
    assert innocent[1] == culprit[1] == CLEAN


def _break_early_in_a_window(
    rank: int, world: int, stage: int
) -> tuple[list[Exception | None], Weights]:
    engine = engine_over_terms(at_stage(stage), 3, model=MayBreak())

    def take(micro: int) -> None:
        engine.backward(engine(64.0, 64.0, breaks=rank == 1 and micro == 0))
        engine.step()

    errors = [caught(lambda micro=micro: take(micro)) for micro in range(3)]
    for _ in range(3):
        after = step_with(engine, 2.0, 4.0)
    return errors, after


@every_stage
def test_an_exception_early_in_a_window_poisons_its_boundary(stage: int) -> None:
    (innocent, after_0), (culprit, after_1) = ranks.shared(
        2, _break_early_in_a_window, stage, timeout=LIMIT
    )
    assert innocent[:2] == [None, None]
    assert_told(innocent[2], StepError, "rank 1", "the user's own backward")
    assert_told(culprit[0], ArithmeticError)
    assert_told(culprit[2], StepError, "the user's own backward")
    assert after_0 == after_1 == CLEAN


def _step_all_the_same(
    rank: int, world: int, stage: int
) -> tuple[list[Exception | None], tuple[int, int], Weights]:
    engine = engine_over_terms(at_stage(stage), 2, model=MayBreak())
    errors = []
    for micro in range(2):
        errors.append(
            caught(
                lambda micro=micro: engine.backward(
                    engine(64.0, 64.0, breaks=(rank, micro) == (1, 0))
                )
            )
        )
        errors.append(caught(engine.step))
    counts = engine.micro_steps, engine.global_steps
    step_with(engine, 2.0, 4.0)
    return errors, counts, step_with(engine, 2.0, 4.0)


@every_stage
def test_a_step_after_a_backward_whose_error_was_caught_is_void(stage: int) -> None:
    """Counted, it would put the rank one micro-batch ahead of its peers."""
    (innocent, counts_0, after_0), (culprit, counts_1, after_1) = ranks.shared(
        2, _step_all_the_same, stage, timeout=LIMIT
    )
    assert innocent[:3] == [None, None, None]
    assert_told(innocent[3], StepError, "rank 1", "the user's own backward")
    assert_told(culprit[0], ArithmeticError)
    assert culprit[1:3] == [None, None]
    assert_told(culprit[3], StepError, "rank 1", "the user's own backward")
    assert counts_0 == counts_1
    assert after_0 == after_1 == CLEAN


def _retry_on_all(rank: int, world: int, stage: int) -> Story:
    engine = engine_over_terms(at_stage(stage), model=MayBreak())
    error = caught(lambda: engine.backward(engine(64.0, 64.0, breaks=True)))
    return error, step_with(engine, 2.0, 4.0)


@every_stage
def test_a_backward_that_raised_on_all_ranks_can_be_retried(stage: int) -> None:
    for error, after in ranks.shared(2, _retry_on_all, stage, timeout=LIMIT):
        assert_told(error, ArithmeticError)
        assert after == CLEAN


def _break_directly_on_rank_1(rank: int, world: int, stage: int, steps_anyway: bool) -> Story:
    engine = engine_over_terms(at_stage(stage), model=MayBreak())
    error = caught(lambda: engine(64.0, 64.0, breaks=rank == 1).backward())
    if rank == 0 or steps_anyway:
        error = caught(engine.step)
    return error, step_with(engine, 2.0, 4.0)


@every_stage
@pytest.mark.parametrize("steps_anyway", [False, True])
def test_an_exception_in_a_direct_backward_is_raised_on_all(steps_anyway: bool, stage: int) -> None:
    innocent, culprit = ranks.shared(
        2, _break_directly_on_rank_1, stage, steps_anyway, timeout=LIMIT
    )
    assert_told(innocent[0], StepError, "rank 1")
    assert_told(culprit[0], StepError if steps_anyway else ArithmeticError)
    assert innocent[1] == culprit[1] == CLEAN


def _no_graph_on_rank_1(rank: int, world: int, stage: int) -> Story:
    engine = engine_over_terms(at_stage(stage))

    def take() -> None:
        loss = engine(64.0, 64.0)
        engine.backward(loss.detach() if rank == 1 else loss)
        engine.step()

    return then_a_clean_step(engine, take)


@every_stage
def test_a_loss_without_a_graph_on_one_rank_is_raised_on_all(stage: int) -> None:
    innocent, culprit = ranks.shared(2, _no_graph_on_rank_1, stage, timeout=LIMIT)
    assert_told(innocent[0], StepError, "rank 1", "graph")
    assert_told(culprit[0], StepError, "graph")
    assert innocent[1] == culprit[1] == CLEAN


def _step_without_backward(rank: int, world: int, stage: int, idle: list[int]) -> Story:
    engine = engine_over_terms(at_stage(stage))

    def take() -> None:
        if rank not in idle:
            engine.backward(engine(64.0, 64.0))
        engine.step()

    return then_a_clean_step(engine, take)


@every_stage
def test_a_rank_that_steps_without_backward_is_named_on_all(stage: int) -> None:
    innocent, culprit = ranks.shared(2, _step_without_backward, stage, [1], timeout=LIMIT)
    assert_told(innocent[0], StepError, "rank 1", "without backward")
    assert_told(culprit[0], StepError, "without backward")
    assert innocent[1] == culprit[1] == CLEAN


def test_a_step_without_any_backward_is_an_error() -> None:
    for error, after in ranks.shared(2, _step_without_backward, 1, [0, 1], timeout=LIMIT):
        assert_told(error, StepError, "backward")
        assert after == CLEAN


def _backward_of_a_vector(rank: int, world: int) -> Story:
    engine = engine_over_terms()
    return then_a_clean_step(engine, lambda: engine.backward(engine(64.0, 64.0) * torch.ones(3, 2)))


def test_a_loss_that_is_not_a_scalar_is_refused_with_its_shape() -> None:
    for error, after in ranks.shared(2, _backward_of_a_vector, timeout=LIMIT):
        assert_told(error, StepError, "(3, 2)")
        assert after == CLEAN


# ---- gradients that are not finite


def _bring_a_nan_on_rank_1(
    rank: int, world: int, stage: int, policy: str
) -> tuple[Exception | None, Weights, int, Weights]:
    engine = engine_over_terms({**at_stage(stage), "zerort": {"on_nonfinite": policy}})
    error = caught(lambda: step_with(engine, 1.0, NAN if rank == 1 else 1.0))
    return error, weights(engine), engine.skipped_steps, step_with(engine, 2.0, 4.0)


@every_stage
def test_a_nan_on_one_rank_skips_the_step_on_all(stage: int) -> None:
    assert (
        ranks.shared(2, _bring_a_nan_on_rank_1, stage, "skip", timeout=LIMIT)
        == [(None, (0.0, 0.0), 1, CLEAN)] * 2
    )


@every_stage
def test_a_nan_on_one_rank_is_raised_on_all_when_asked_for(stage: int) -> None:
    for error, untouched, _, after in ranks.shared(
        2, _bring_a_nan_on_rank_1, stage, "raise", timeout=LIMIT
    ):
        assert_told(error, NonFiniteGradient, "rank 1", "parameter b")
        assert (untouched, after) == ((0.0, 0.0), CLEAN)


def _log_of(call: Callable[[], Any]) -> list[str]:
    """What the package logs meanwhile."""
    lines = log_lines()
    call()
    return list(lines)


def _log_of_a_nan(rank: int, world: int, stage: int) -> list[str]:
    engine = engine_over_terms(at_stage(stage))
    step_with(engine, 1.0, 1.0)
    return _log_of(lambda: step_with(engine, 1.0, NAN if rank == 1 else 1.0))


@whole_and_sharded
def test_a_skipped_step_says_which_rank_and_parameter_once(stage: int) -> None:
    told, silent = ranks.shared(2, _log_of_a_nan, stage, timeout=LIMIT)
    assert len(told) == 1 and re.search("OVERFLOW.*rank 1.*parameter b", told[0])
    assert silent == []


# ---- parameters that are not used


def _log_of_an_unused_parameter(rank: int, world: int, stage: int) -> list[list[str]]:
    """While `b` is unused on rank 1, and then while `a` is on all."""
    engine = engine_over_terms(at_stage(stage))
    step_with(engine, 1.0, 1.0)
    return [
        _log_of(lambda: [step_with(engine, 1.0, None if rank == 1 else 1.0) for _ in range(3)]),
        _log_of(lambda: [step_with(engine, None, 1.0) for _ in range(3)]),
    ]


@whole_and_sharded
def test_an_unused_parameter_is_named_once(stage: int) -> None:
    innocent, culprit = ranks.shared(2, _log_of_an_unused_parameter, stage, timeout=LIMIT)
    assert innocent[0] == []
    assert len(culprit[0]) == 1 and "no gradient came for b" in culprit[0][0]
    for _, told in (innocent, culprit):
        assert len(told) == 1 and "no gradient came for a" in told[0]


def _use_b_on_rank_0_only(rank: int, world: int, stage: int) -> Story:
    engine = engine_over_terms({"zerort": {"unused_parameters": "raise"}, **at_stage(stage)})
    return then_a_clean_step(engine, lambda: step_with(engine, 64.0, None if rank == 1 else 64.0))


@every_stage
def test_an_unused_parameter_is_an_error_when_asked_for(stage: int) -> None:
    for error, after in ranks.shared(2, _use_b_on_rank_0_only, stage, timeout=LIMIT):
        assert_told(error, StepError, " b")
        assert after == CLEAN


def _freeze_b_on_rank_1(rank: int, world: int, stage: int) -> Story:
    engine = engine_over_terms(at_stage(stage))
    engine.module.b.requires_grad_(rank == 0)
    error = caught(lambda: step_with(engine, 64.0, 64.0))
    engine.module.b.requires_grad_(True)
    return error, step_with(engine, 2.0, 4.0)


@every_stage
def test_ranks_that_freeze_different_parameters_stop_before_they_change(stage: int) -> None:
    for error, after in ranks.shared(2, _freeze_b_on_rank_1, stage, timeout=LIMIT):
        assert_told(error, PlanMismatch, "parameter b")
        assert after == CLEAN


# ---- peers that are gone


def _die_in_the_second_step(
    rank: int, world: int, how: str, stage: int
) -> tuple[Exception | None, float]:
    engine = engine_over_terms({"zerort": {"timeout": 2}, **at_stage(stage)})
    step_with(engine, 1.0, 1.0)
    processes = [0, 0]
    dist.all_gather_object(processes, os.getpid())
    start = time.monotonic()
    if rank == 1:
        if how == "exception":
            raise KeyError("out of the training loop")
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    error = caught(lambda: step_with(engine, 1.0, 1.0))
    seconds = time.monotonic() - start
    if how == "stop":
        os.kill(processes[1], signal.SIGKILL)  # so that nobody waits for it any longer
    return error, seconds


@whole_and_sharded
@pytest.mark.parametrize(("how", "limit"), [("exception", 3.0), ("kill", 3.0), ("stop", 6.0)])
def test_a_lost_peer_is_a_communication_error_in_time(how: str, limit: float, stage: int) -> None:
    survivor, _ = ranks.attempt(2, _die_in_the_second_step, how, stage, timeout=10)
    assert isinstance(survivor, ranks.Returned), survivor
    error, seconds = survivor.value
    assert_told(error, CommError, "rank 1")
    assert seconds < limit


def _fail_beside_what_waits(rank: int, world: int, dtype: str) -> Story:
    engine = engine_over_terms(
        {dtype: {"enabled": True}} if dtype != "fp32" else {}, model=MayBreak()
    )
    with engine.no_sync():
        engine.backward(engine(64.0, 64.0))

    def take_step() -> None:
        engine.backward(engine(64.0, 64.0, breaks=rank == 1))
        with engine.no_sync():
            engine.backward(engine(64.0, 64.0))
        engine.step()

    return then_a_clean_step(engine, take_step)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_waits_beside_a_failure_is_dropped_with_it(dtype: str) -> None:
    for error, after in ranks.shared(2, _fail_beside_what_waits, dtype, timeout=LIMIT):
        assert error is not None and after == CLEAN


def _stay_away(rank: int, world: int, stage: int) -> Exception | None:
    engine = engine_over_terms({"zerort": {"timeout": 2}, **at_stage(stage)})
    step_with(engine, 1.0, 1.0)
    if rank == 1:
        return None  # to the user's own code, where nothing of ours can see it
    return caught(lambda: step_with(engine, 1.0, 1.0))


@whole_and_sharded
def test_a_rank_that_does_not_come_is_named_though_it_runs(stage: int) -> None:
    first, _, third = ranks.shared(3, _stay_away, stage, timeout=LIMIT)
    for error in (first, third):
        assert_told(error, CommError, "rank 1", "did not come to this point", "zerort.timeout")


def _wait_for_different_things(rank: int, world: int) -> Exception | None:
    engine = engine_over_terms({"zerort": {"timeout": 2}})
    step_with(engine, 1.0, 1.0)
    if rank == 1:
        return caught(lambda: engine.load_checkpoint("nowhere"))
    return caught(lambda: step_with(engine, 1.0, 1.0))


def test_ranks_that_wait_for_different_things_tell_each_other() -> None:
    stepping, loading = ranks.shared(2, _wait_for_different_things, timeout=LIMIT)
    assert_told(stepping, CommError, "rank 1", "waited for all_gather_object")
    assert_told(loading, CommError, "rank 0", "waited for reduce_scatter of bucket 0")


def _train_on_after_the_group_is_closed(rank: int, world: int) -> Exception | None:
    engine = engine_over_terms({"zerort": {"transport": "gloo"}})
    step_with(engine, 1.0, 1.0)
    dist.barrier()
    dist.destroy_process_group()
    error = caught(lambda: step_with(engine, 1.0, 1.0))
    engine.destroy()
    return error


def test_a_closed_process_group_is_an_error_that_says_so() -> None:
    for error in ranks.shared(2, _train_on_after_the_group_is_closed, timeout=LIMIT):
        assert_told(error, CommError, "group")


# ---- gradients that are not dense


class _Sparse(Terms):
    """`Terms` with an embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 3, sparse=True)

    def forward(self, a: float, b: float, word: int | None = None) -> Tensor:
        loss = super().forward(a, b)
        return loss if word is None else loss + self.words(torch.tensor([word])).sum()


def _first_column(weight: Tensor) -> Tensor:
    with zerort.zero.GatheredParameters([weight]):
        return weight.detach()[:, 0].clone()


def _train_a_sparse_embedding(
    rank: int, world: int, policy: str, stage: int
) -> tuple[Exception | None, list[float]]:
    def take() -> list[float]:
        torch.manual_seed(0)
        engine = engine_over_terms(
            {"zerort": {"sparse_gradients": policy}, **at_stage(stage)}, model=_Sparse()
        )
        before = _first_column(engine.module.words.weight)
        engine.backward(engine(1.0, 1.0, word=rank))
        engine.step()
        moved.extend((_first_column(engine.module.words.weight) - before).tolist())
        return moved

    moved: list[float] = []
    return caught(take), moved


@every_stage
def test_a_sparse_gradient_is_refused_with_its_modules_name(stage: int) -> None:
    for error, _ in ranks.shared(2, _train_a_sparse_embedding, "refuse", stage, timeout=LIMIT):
        assert_told(error, ZerortError, "words")


@every_stage
def test_a_sparse_gradient_is_made_dense_when_asked_for(stage: int) -> None:
    for error, moved in ranks.shared(2, _train_a_sparse_embedding, "densify", stage, timeout=LIMIT):
        assert error is None
        assert moved == pytest.approx([-0.5, -0.5, 0.0, 0.0], abs=1e-6)


# ---- a parameter that left its buffer

LEAVINGS: dict[str, Callable[[nn.Module], Any]] = {
    "double_and_back": lambda module: module.double().float(),
    "assigned": lambda module: module.load_state_dict(
        {"a": torch.ones(4), "b": torch.ones(4)}, assign=True
    ),
    "new_data": lambda module: setattr(module.a, "data", torch.ones(4)),
}


def _move_parameters(rank: int, world: int, how: str, stage: int) -> Exception | None:
    engine = engine_over_terms(at_stage(stage))

    def leave() -> None:
        LEAVINGS[how](engine.module)
        step_with(engine, 1.0, 1.0)

    return caught(leave)


@whole_and_sharded
@pytest.mark.parametrize("how", LEAVINGS)
def test_a_parameter_that_left_its_buffer_is_named(how: str, stage: int) -> None:
    for error in ranks.shared(2, _move_parameters, how, stage, timeout=LIMIT):
        assert_told(error, StepError, "a")
