"""What is easily done to an engine by mistake: said at once on every rank, or harmless, and the
engine goes on.

The weights are minus the mean gradient (see `Terms`): what a mistake left behind would show in the
step after it.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
from catching import assert_told, caught
from models import Terms
from terms import Weights, at_each_stage, engine_over_terms, step_with, weights
from training import at_stage
from zerort.errors import CommError, StepError

pytestmark = pytest.mark.timeout(120)
below_3 = pytest.mark.parametrize("stage", [0, 1, 2])
every_stage = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])

LIMIT = 30.0  # seconds a scenario may take, start included
CLEAN = (-2.0, -4.0)

# ---- calls that do not fit

UNFIT = {
    "nothing": (lambda loss: None, "got NoneType"),
    "a number": (lambda loss: loss.item(), "got float"),
    "what a model returned": (lambda loss: {"loss": loss}, "got dict"),
    "a vector": (lambda loss: loss * torch.ones(3), "(3,)"),
    "detached": (lambda loss: loss.detach(), "no graph"),
}


def _go_back_over(rank: int, world: int, what: str) -> tuple[Exception | None, Weights]:
    engine = engine_over_terms()
    error = caught(lambda: engine.backward(UNFIT[what][0](engine(64.0, 64.0))))
    return error, step_with(engine, 2.0, 4.0)


@pytest.mark.parametrize("what", UNFIT)
def test_what_is_no_loss_is_named_for_what_it_is(what: str) -> None:
    for error, after in ranks.shared(2, _go_back_over, what, timeout=LIMIT):
        assert_told(error, StepError, UNFIT[what][1])
        assert after == CLEAN


def a_loss_is_not_scaled_twice(engine: Any) -> None:
    engine.backward(engine.scale(engine(64.0, 64.0)))


def a_step_under_inference_mode_is_refused(engine: Any) -> None:
    engine.backward(engine(64.0, 64.0))
    with torch.inference_mode():
        engine.step()


def a_loss_made_under_inference_mode_has_no_graph(engine: Any) -> None:
    with torch.inference_mode():
        loss = engine(64.0, 64.0)
    engine.backward(loss)


def a_second_step_has_no_backward(engine: Any) -> None:
    step_with(engine, 0.0, 0.0)
    engine.step()


WRONG: dict[Callable[[Any], None], str] = {
    a_loss_is_not_scaled_twice: "scaled twice",
    a_step_under_inference_mode_is_refused: "inference_mode",
    a_loss_made_under_inference_mode_has_no_graph: "inference_mode",
    a_second_step_has_no_backward: "without backward",
}


def _do_wrong(
    rank: int, world: int, act: Callable[[Any], None]
) -> tuple[Exception | None, Weights]:
    model = Terms()
    engine = engine_over_terms(
        {"fp16": {"enabled": True, "loss_scale": 4.0}},
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )
    return caught(lambda: act(engine)), step_with(engine, 2.0, 4.0)


@pytest.mark.parametrize("act", WRONG, ids=lambda act: act.__name__)
def test_calls_in_the_wrong_place(act: Callable[[Any], None]) -> None:
    for error, after in ranks.shared(2, _do_wrong, act, timeout=LIMIT):
        assert_told(error, StepError, WRONG[act])
        assert after == CLEAN


def evaluation_under_inference_mode_leaves_training_alone(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    with torch.inference_mode():
        engine(64.0, 64.0)
    engine.backward(engine(2.0, 4.0))
    with torch.inference_mode():
        engine.eval()(64.0, 64.0)
    engine.train().step()
    assert step_with(engine, 2.0, 4.0) == CLEAN


def an_engine_is_neither_copied_nor_pickled(rank: int, world: int) -> None:
    engine = engine_over_terms()
    for call in (copy.copy, copy.deepcopy, pickle.dumps, torch.optim.swa_utils.AveragedModel):
        assert_told(
            caught(lambda call=call: call(engine)), StepError, "engine.module", "save_checkpoint"
        )
    assert step_with(engine, 2.0, 4.0) == CLEAN


def groups_of_the_optimizer_stay_as_they_were(rank: int, world: int) -> None:
    for change in (
        lambda optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4))]}),
        lambda optimizer: optimizer.param_groups[0].update(params=[nn.Parameter(torch.zeros(4))]),
    ):
        engine = engine_over_terms()
        kept = [dict(group) for group in engine.optimizer.param_groups]
        change(engine.optimizer)
        assert_told(
            caught(lambda engine=engine: step_with(engine, 64.0, 64.0)),
            StepError,
            "add_param_group",
        )
        engine.optimizer.param_groups[:] = kept
        assert step_with(engine, 2.0, 4.0) == CLEAN


def the_batch_size_does_not_change_within_a_window(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    step_with(engine, 2.0, 4.0)
    assert_told(
        caught(lambda: engine.set_train_batch_size(3 * world)),
        StepError,
        "from 2 to 3 steps",
        "boundary",
    )
    engine.set_train_batch_size(2 * world)  # what it is already
    assert engine.train_batch_size() == 2 * world
    assert step_with(engine, 2.0, 4.0) == CLEAN


def nor_between_a_backward_and_its_step(rank: int, world: int) -> None:
    engine = engine_over_terms()
    engine.backward(engine(2.0, 4.0))
    assert_told(
        caught(lambda: engine.set_train_batch_size(2 * world)), StepError, "from 1 to 2 steps"
    )
    engine.step()
    assert weights(engine) == CLEAN


def zero_grad_lets_the_window_begin_with_another_kind_of_backward(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    engine(64.0, 64.0).backward()
    engine.zero_grad()
    engine.backward(engine(2.0, 4.0))
    engine.step()
    assert step_with(engine, 2.0, 4.0) == CLEAN


def a_graph_of_the_gradients_does_no_harm(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    for _ in range(2):
        engine(2.0, 4.0).backward(create_graph=True)
        engine.step()
    assert weights(engine) == CLEAN


HARMLESS: list[Callable[[int, int], None]] = [
    evaluation_under_inference_mode_leaves_training_alone,
    an_engine_is_neither_copied_nor_pickled,
    groups_of_the_optimizer_stay_as_they_were,
    the_batch_size_does_not_change_within_a_window,
    nor_between_a_backward_and_its_step,
    zero_grad_lets_the_window_begin_with_another_kind_of_backward,
    pytest.param(
        a_graph_of_the_gradients_does_no_harm,
        marks=pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph"),
    ),
]


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("scenario", HARMLESS, ids=lambda scenario: scenario.__name__)
def test_mistakes(scenario: Callable[[int, int], None], world: int, stage: int) -> None:
    if stage == 3 and scenario is a_graph_of_the_gradients_does_no_harm:
        pytest.skip("refused at stage 3, see params/test_stage_3_failures.py")
    ranks.shared(world, at_each_stage, stage, scenario, timeout=LIMIT)


# ---- code of the user's that raises on one rank


class _PickyForward(Terms):
    """`Terms` that refuses some batches."""

    def forward(self, a: float, b: float, bad: bool = False) -> Tensor:
        if bad:
            raise ValueError("a batch that does not fit")
        return super().forward(a, b)


def _try_a_forward_again(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage), model=_PickyForward())
    for _ in range(2):
        error = caught(lambda: engine(64.0, 64.0, bad=rank == 1))
        assert (error is None) == (rank == 0)
        step_with(engine, 1.0, 2.0)
    return weights(engine)


@below_3
def test_a_forward_that_raised_on_one_rank_can_be_tried_again(stage: int) -> None:
    assert ranks.shared(2, _try_a_forward_again, stage, timeout=LIMIT) == [CLEAN] * 2


def _give_up_after_a_forward(rank: int, world: int, stage: int) -> tuple[Exception | None, Weights]:
    engine = engine_over_terms(at_stage(stage), model=_PickyForward())

    def take() -> None:
        try:
            loss = engine(64.0, 64.0, bad=rank == 1)
        except ValueError:
            engine.step()
        engine.backward(loss)
        engine.step()

    return caught(take), step_with(engine, 2.0, 4.0)


@below_3
def test_a_rank_whose_forward_raised_gives_up_on_all_by_a_step(stage: int) -> None:
    for error, after in ranks.shared(2, _give_up_after_a_forward, stage, timeout=LIMIT):
        assert_told(error, StepError, "without backward")
        assert after == CLEAN


def _misname_an_argument_of_the_scheduler(
    rank: int, world: int
) -> tuple[Exception | None, Weights]:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    engine = engine_over_terms(model=model, optimizer=optimizer, lr_scheduler=schedule)
    engine.backward(engine(1.0, 2.0))
    error = caught(lambda: engine.step(lr_kwargs={"metric": 1.0} if rank == 1 else None))
    return error, step_with(engine, 1.0, 2.0)


def test_what_a_scheduler_does_not_take_is_found_before_the_update_on_all_ranks() -> None:
    for error, after in ranks.shared(2, _misname_an_argument_of_the_scheduler, timeout=LIMIT):
        assert_told(error, StepError, "cannot be stepped", "metric", "lr_kwargs")
        assert after == (-1.0, -2.0)


class _Breaking(torch.optim.SGD):
    """Its step raises while `broken`."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        if _Breaking.broken:
            raise ArithmeticError("an optimizer of the user's own")
        return super().step(closure)


def _break_the_optimizer_on_rank_1(
    rank: int, world: int, stage: int, folder: str
) -> tuple[Exception | None, Exception | None, Weights]:
    model = Terms()
    engine = engine_over_terms(
        at_stage(stage), model=model, optimizer=_Breaking(model.parameters(), lr=1.0)
    )
    engine.save_checkpoint(folder)
    _Breaking.broken = rank == 1
    first = caught(lambda: step_with(engine, 64.0, 64.0))
    _Breaking.broken = False
    second = caught(lambda: step_with(engine, 64.0, 64.0))
    engine.load_checkpoint(folder)
    return first, second, step_with(engine, 2.0, 4.0)


@below_3
def test_an_optimizer_that_raises_on_one_rank_stops_all_until_a_checkpoint_is_loaded(
    stage: int,
) -> None:
    """Going on would leave ranks with different weights at stage 0, and half an update at the
    others.
    """
    with tempfile.TemporaryDirectory() as folder:
        innocent, culprit = ranks.shared(
            2, _break_the_optimizer_on_rank_1, stage, folder, timeout=LIMIT
        )
    assert innocent[0] is None
    assert_told(culprit[0], ArithmeticError, "user's own")
    for _, second, after in (innocent, culprit):
        assert_told(
            second, StepError, "rank 1", "an optimizer of the user's own", "load a checkpoint"
        )
        assert after == CLEAN


def _interrupt_rank_1(rank: int, world: int, stage: int) -> tuple[str, Weights]:
    class Interrupted(torch.autograd.Function):
        armed = rank == 1

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if Interrupted.armed:
                raise KeyboardInterrupt
            return gradient

    class Model(Terms):
        def forward(self, a: float, b: float) -> Tensor:
            return a * Interrupted.apply(self.a).sum() + b * self.b.sum()

    engine = engine_over_terms(at_stage(stage), model=Model())
    told = ""
    try:
        step_with(engine, 64.0, 64.0)
    except (KeyboardInterrupt, StepError) as error:
        told = repr(error)
    Interrupted.armed = False
    return told, step_with(engine, 2.0, 4.0)


@every_stage
def test_an_interrupt_on_one_rank_that_is_caught_is_told_to_all(stage: int) -> None:
    (innocent, after_0), (culprit, after_1) = ranks.shared(
        2, _interrupt_rank_1, stage, timeout=LIMIT
    )
    assert "rank 1: KeyboardInterrupt" in innocent and culprit == "KeyboardInterrupt()"
    assert after_0 == after_1 == CLEAN


# ---- ranks that go different ways


def _leave_the_loop_before_the_step(rank: int, world: int) -> Exception | None:
    engine = engine_over_terms({"zerort": {"timeout": 1}})
    engine.backward(engine(1.0, 1.0))
    return caught(engine.step if rank == 0 else lambda: engine.save_checkpoint("never"))


def test_ranks_that_part_before_a_step_are_told_so_once_and_in_time() -> None:
    stepping, saving = ranks.shared(2, _leave_the_loop_before_the_step, timeout=LIMIT)
    assert_told(stepping, CommError, "rank 1", "waited for all_gather_object")
    assert_told(saving, CommError, "rank 0", "waited for all_reduce")
    assert [str(error).count("waited for") for error in (stepping, saving)] == [1, 1]


# ---- two engines whose graphs meet


def _train_two_that_meet(rank: int, world: int, way: str) -> tuple[Weights, Weights]:
    """As a GAN does: `first` learns through `second`, which must not learn from that."""
    first, second = engine_over_terms(), engine_over_terms()
    for _ in range(2):
        if way == "freeze":
            second.module.requires_grad_(False)
        first.backward(first(1.0 + rank, 2.0) + second(64.0, 64.0))
        first.step()
        second.module.requires_grad_(True)
        if way == "drop":
            second.zero_grad()
        second.backward(second(3.0 + rank, 4.0))
        second.step()
    return weights(first), weights(second)


@pytest.mark.parametrize("way", ["freeze", "drop"])
def test_an_engine_that_anothers_backward_reaches_can_be_frozen_or_drop_it(way: str) -> None:
    assert (
        ranks.shared(2, _train_two_that_meet, way, timeout=LIMIT)
        == [((-3.0, -4.0), (-7.0, -8.0))] * 2
    )
