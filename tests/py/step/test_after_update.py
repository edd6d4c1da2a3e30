"""Objects of the user's that raise when the parameters of all ranks have moved: the error says that
the step stands, the counters say so too, and ranks do not part.
"""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import ranks
from catching import assert_told, caught
from models import Terms
from terms import Weights, engine_over_terms, step_with, weights
from training import at_stage
from zerort.errors import CheckpointError, StepError
from zerort.features.trace_mark import TraceMark
from zerort.step.vote import vote

pytestmark = pytest.mark.timeout(120)
every_stage = pytest.mark.parametrize("stage", [0, 1, 2])

LIMIT = 40.0


class _Schedule(torch.optim.lr_scheduler.LambdaLR):
    """A constant rate; its step raises while `broken`."""

    broken: BaseException | None = None

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda step: 1.0)

    def step(self, epoch: Any = None) -> None:
        if self.broken is not None:
            raise self.broken
        super().step(epoch)


def _counts(engine: Any) -> tuple[int, ...]:
    return engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.global_samples


def _engine(stage: int, **more: Any) -> Any:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return engine_over_terms(
        {**at_stage(stage), **more}, model=model, optimizer=optimizer, lr_scheduler=_Schedule
    )


def _break_the_schedule(
    rank: int, world: int, stage: int, interrupt: bool, folder: str
) -> tuple[Any, ...]:
    engine = _engine(stage)
    engine.save_checkpoint(folder)
    if rank == 1:
        engine.lr_scheduler.broken = KeyboardInterrupt() if interrupt else ValueError("no rate")
    first = None
    try:
        step_with(engine, 1.0, 2.0)
    except (StepError, KeyboardInterrupt) as error:
        first = (type(error).__name__, str(error), type(error.__cause__).__name__)
    after = weights(engine), _counts(engine), engine.was_step_applied()
    engine.lr_scheduler.broken = None
    second = caught(lambda: step_with(engine, 64.0, 64.0))
    unmoved = weights(engine)
    engine.load_checkpoint(folder)
    return first, after, second, unmoved, step_with(engine, 2.0, 4.0)


@every_stage
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_scheduler_that_raises_stops_all_ranks_and_the_update_stands(
    stage: int, interrupt: bool, tmp_path: Path
) -> None:
    innocent, culprit = ranks.shared(
        2, _break_the_schedule, stage, interrupt, str(tmp_path), timeout=LIMIT
    )
    assert innocent[0] is None
    if interrupt:
        assert culprit[0][0] == "KeyboardInterrupt"
    else:
        kind, message, cause = culprit[0]
        assert (kind, cause) == ("StepError", "ValueError")
        assert (
            "step 1 was applied on all ranks, and that stands" in message and "no rate" in message
        )
    for _, after, second, unmoved, clean in (innocent, culprit):
        assert after == ((-1.0, -2.0), (1, 1, 0, 2), True)
        assert_told(second, StepError, "rank 1", "step 1 was applied", "load a checkpoint")
        assert unmoved == (-1.0, -2.0)
        assert clean == (-2.0, -4.0)


class _Loud:
    """A trace that breaks a promise of its kind: it raises at the end of a step."""

    enabled = False

    def step(self, number: int) -> None:
        raise OSError("the disk of the trace is full")


def _break_the_trace(rank: int, world: int, stage: int) -> tuple[Any, ...]:
    engine = _engine(stage)
    mark = engine._events.find(TraceMark)
    quiet, mark._sink = mark._sink, _Loud() if rank == 0 else mark._sink
    error = caught(lambda: step_with(engine, 1.0, 2.0))
    mark._sink = quiet
    between = weights(engine), _counts(engine), engine.lr_scheduler.last_epoch
    return error, between, step_with(engine, 1.0, 2.0)


@every_stage
def test_a_trace_that_raises_says_that_the_step_stands_and_training_goes_on(stage: int) -> None:
    culprit, other = ranks.shared(2, _break_the_trace, stage, timeout=LIMIT)
    assert other[0] is None
    assert_told(culprit[0], StepError, "step 1 was applied on all ranks", "OSError", "full")
    for _, between, after in (culprit, other):
        assert between == ((-1.0, -2.0), (1, 1, 0, 2), 1)
        assert after == (-2.0, -4.0)


def _need_metrics(rank: int, world: int) -> tuple[Exception | None, Weights, float, Weights]:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    engine = engine_over_terms(model=model, optimizer=optimizer, lr_scheduler=plateau)
    error = caught(lambda: step_with(engine, 64.0, 64.0))
    unmoved = weights(engine)
    engine.backward(engine(2.0, 4.0))
    engine.step(lr_kwargs={"metrics": 1.0})
    return error, unmoved, plateau.best, weights(engine)


def test_a_scheduler_that_needs_more_than_it_is_given_is_found_before_the_update() -> None:
    for error, unmoved, best, after in ranks.shared(2, _need_metrics, timeout=LIMIT):
        assert_told(error, StepError, "ReduceLROnPlateau", "metrics", "lr_kwargs")
        assert (unmoved, best, after) == ((0.0, 0.0), 1.0, (-2.0, -4.0))


class _Half(torch.optim.SGD):
    """Raises in the middle of its step while `broken`."""

    broken = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        if self.broken:
            raise MemoryError("no room")


def _save_half_updated(rank: int, world: int, folder: str) -> tuple[Any, ...]:
    model = Terms()
    optimizer = _Half(model.parameters(), lr=1.0)
    engine = engine_over_terms(at_stage(1), model=model, optimizer=optimizer)
    step_with(engine, 1.0, 2.0)
    engine.save_checkpoint(folder, "good")
    optimizer.broken = rank == 1
    step = caught(lambda: step_with(engine, 64.0, 64.0))
    optimizer.broken = False
    save = caught(lambda: engine.save_checkpoint(folder, "half"))
    export = caught(lambda: engine.save_16bit_model(folder))
    engine.load_checkpoint(folder)
    after = step_with(engine, 2.0, 4.0)
    engine.save_checkpoint(folder, "after")
    return step, save, export, after


def test_what_is_half_updated_on_a_rank_is_not_saved_on_any(tmp_path: Path) -> None:
    innocent, culprit = ranks.shared(2, _save_half_updated, str(tmp_path), timeout=LIMIT)
    assert innocent[0] is None and isinstance(culprit[0], MemoryError)
    for _, save, export, after in (innocent, culprit):
        for refused in (save, export):
            assert_told(refused, CheckpointError, "was not saved", "rank 1", "may be half updated")
        assert after == (-3.0, -6.0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["after", "good"]


def _interrupt_the_vote(rank: int, world: int, folder: str) -> tuple[Any, ...]:
    engine = engine_over_terms(at_stage(0))
    engine.save_checkpoint(folder)
    if rank == 1:
        patch = mock.patch("zerort.step.boundary.vote", side_effect=_then_interrupt)
        with patch, pytest.raises(KeyboardInterrupt):
            step_with(engine, 64.0, 64.0)
        engine._parts.reduction.learn()  # what its peer waits for, in this scene alone
    else:
        step_with(engine, 64.0, 64.0)
    save = caught(lambda: engine.save_checkpoint(folder))
    step = caught(lambda: step_with(engine, 64.0, 64.0))
    engine.load_checkpoint(folder)
    return save, step, step_with(engine, 2.0, 4.0)


def _then_interrupt(*args: Any) -> None:
    vote(*args)
    raise KeyboardInterrupt


def test_an_interrupt_behind_the_vote_leaves_no_rank_with_weights_of_its_own(
    tmp_path: Path,
) -> None:
    for save, step, after in ranks.shared(2, _interrupt_the_vote, str(tmp_path), timeout=LIMIT):
        assert_told(save, CheckpointError, "rank 1", "KeyboardInterrupt at the boundary")
        assert_told(step, StepError, "rank 1", "KeyboardInterrupt at the boundary")
        assert after == (-2.0, -4.0)


def _press_ctrl_c_behind_the_vote(rank: int, world: int, stage: int) -> tuple[Any, ...]:
    engine = _engine(stage, zerort={"timeout": 5})
    raised = False
    behind = mock.patch("zerort.step.boundary.vote", side_effect=_vote_and_press_ctrl_c)
    with behind if rank == 1 else nullcontext():
        try:
            engine.backward(engine(1.0, 2.0))
            engine.step()
        except KeyboardInterrupt:
            raised = True
    same = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    between = weights(engine), _counts(engine), engine.lr_scheduler.last_epoch
    return raised, same, between, step_with(engine, 1.0, 2.0)


def _vote_and_press_ctrl_c(*args: Any) -> Any:
    verdict = vote(*args)
    signal.raise_signal(signal.SIGINT)
    return verdict


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ctrl_c_behind_the_vote_comes_out_behind_the_whole_step(stage: int) -> None:
    """Broken off there, the step would leave the other rank waiting for shards."""
    told = ranks.shared(2, _press_ctrl_c_behind_the_vote, stage, timeout=LIMIT)
    assert [raised for raised, *_ in told] == [False, True]
    for _, same, between, after in told:
        assert same and between == ((-1.0, -2.0), (1, 1, 0, 2), 1)
        assert after == (-2.0, -4.0)


def _press_ctrl_c_in_a_vote_that_fails(rank: int, world: int) -> tuple[Any, ...]:
    engine = engine_over_terms({"zerort": {"timeout": 5}})
    behind = mock.patch("zerort.step.boundary.vote", side_effect=_vote_and_press_ctrl_c)
    raised: BaseException | None = None
    with behind if rank == 1 else nullcontext():
        try:
            engine.backward(engine(1.0, 1.0).detach() if rank == 0 else engine(1.0, 1.0))
            engine.step()
        except BaseException as error:
            raised = error
    return type(raised).__name__, step_with(engine, 2.0, 4.0)


def test_ctrl_c_in_a_vote_that_fails_comes_out_once_all_have_its_reason() -> None:
    told = ranks.shared(2, _press_ctrl_c_in_a_vote_that_fails, timeout=LIMIT)
    assert told == [("StepError", (-2.0, -4.0)), ("KeyboardInterrupt", (-2.0, -4.0))]


def _interrupt_the_publishing(rank: int, world: int, stage: int) -> tuple[Any, ...]:
    engine = _engine(stage)
    reduction, raised = engine._parts.reduction, False
    publish = reduction.publish

    def interrupted(**how: bool) -> None:
        publish(**how)
        raise KeyboardInterrupt

    with mock.patch.object(reduction, "publish", interrupted if rank == 1 else publish):
        try:
            step_with(engine, 1.0, 2.0)
        except KeyboardInterrupt:
            raised = True
    between = weights(engine), _counts(engine), engine.lr_scheduler.last_epoch
    return raised, between, engine.was_step_applied(), step_with(engine, 1.0, 2.0)


@every_stage
def test_an_interrupt_while_shards_are_published_comes_out_behind_the_whole_step(
    stage: int,
) -> None:
    told = ranks.shared(2, _interrupt_the_publishing, stage, timeout=LIMIT)
    assert [raised for raised, *_ in told] == [False, True]
    for _, between, applied, after in told:
        assert between == ((-1.0, -2.0), (1, 1, 0, 2), 1)
        assert applied and after == (-2.0, -4.0)
