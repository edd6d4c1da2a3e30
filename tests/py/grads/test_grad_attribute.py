"""`.grad` outside a backward: what was there before, what is written there afterwards, and what is
said of it.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import ranks
from catching import assert_told, caught
from models import Terms
from terms import engine_over_terms, step_with, weights
from training import at_stage
from zerort.errors import StepError

pytestmark = pytest.mark.timeout(120)
every_stage = pytest.mark.parametrize("stage", [0, 1, 2])


@contextmanager
def _log() -> Iterator[list[tuple[int, str]]]:
    """(level, message) of all that the package logs meanwhile."""
    lines: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda r: lines.append((r.levelno, r.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("zerort")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


def _about(lines: list[tuple[int, str]], words: str) -> list[int]:
    return [level for level, message in lines if words in message]


def _start_with_gradients(rank: int, world: int, stage: int) -> tuple[Any, ...]:
    model = Terms()
    if rank == 1:
        (model(64.0, 64.0)).backward()
    with _log() as lines:
        engine = engine_over_terms(at_stage(stage), model=model)
    return (
        model.a.grad,
        _about(lines, "a and 1 more parameters had a .grad"),
        step_with(engine, 2.0, 4.0),
    )


@every_stage
def test_a_grad_from_before_initialize_is_dropped_with_a_word(stage: int) -> None:
    for rank, (left, said, after) in enumerate(ranks.shared(2, _start_with_gradients, stage)):
        assert (left, after) == (None, (-2.0, -4.0))
        assert said == ([logging.WARNING] if rank == 1 else [])


def _train_by_clip(rank: int, world: int, clip: float) -> list[int]:
    with _log() as lines:
        engine = engine_over_terms({"gradient_clipping": clip})
        for _ in range(3):
            step_with(engine, 1.0, 2.0)
    return _about(lines, "get_global_grad_norm")


def test_where_gradients_are_is_said_once_by_rank_0() -> None:
    assert ranks.shared(2, _train_by_clip, 100.0) == [[logging.INFO], []]


def test_where_clipping_is_off_each_rank_that_has_a_log_warns_in_it() -> None:
    """Who clips by torch's function turns it off, and finds nothing on any rank."""
    assert ranks.shared(2, _train_by_clip, 0.0) == [[logging.WARNING]] * 2


def _shown_by_clip(rank: int, world: int) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        engine = engine_over_terms({"gradient_clipping": 0.0})
        step_with(engine, 1.0, 2.0)
    return shown.getvalue()


def test_where_no_rank_has_a_log_of_its_own_rank_0_warns_for_all() -> None:
    first, second = ranks.shared(2, _shown_by_clip)
    assert (first.count("get_global_grad_norm"), second) == (1, "")


def _write_a_grad(rank: int, world: int, stage: int, gas: int) -> tuple[Any, ...]:
    engine = engine_over_terms(at_stage(stage), gas)
    for _ in range(2 * gas):
        step_with(engine, 1.0, 2.0)
    before = weights(engine)
    with _log() as lines:
        for micro in range(gas):
            engine.backward(engine(1.0, 2.0))
            if micro == gas - 1 and rank == 1:
                engine.module.b.grad = torch.full((4,), 8.0)
            engine.step()
    moved = tuple(new - old for new, old in zip(weights(engine), before, strict=True))
    return _about(lines, "parameter b has a .grad"), moved


@every_stage
@pytest.mark.parametrize("gas", [1, 2])
def test_a_grad_that_is_written_after_its_backward_is_named_and_added(gas: int, stage: int) -> None:
    silent, writer = ranks.shared(2, _write_a_grad, stage, gas)
    assert (silent[0], writer[0]) == ([], [logging.WARNING])
    assert silent[1] == writer[1] == (-1.0, -2.0 - 4.0)


class _Twice(Terms):
    """`b` gets a second part of its gradient behind all others, from the third backward on."""

    calls = 0

    def forward(self, a: float, b: float) -> torch.Tensor:  # type: ignore[override]
        self.calls += 1
        loss = super().forward(a, b)
        if self.calls > 2:
            loss = loss + _Again.apply(self.a * 1.0, self.b).sum() * 0.0
        return loss


class _Again(torch.autograd.Function):
    """Runs a backward of its own inside the backward, once the others have come."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, b: torch.nn.Parameter) -> torch.Tensor:
        ctx.b = b
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.enable_grad():
            ctx.b.sum().backward()
        return gradient, None


def _late(rank: int, world: int) -> tuple[Any, ...]:
    engine = engine_over_terms(model=_Twice())
    with _log() as lines:
        for _ in range(4):
            step_with(engine, 1.0, 2.0)
    return _about(lines, "has a .grad that was not there"), weights(engine)


def test_a_gradient_that_is_late_is_not_taken_for_one_that_was_written() -> None:
    assert ranks.shared(2, _late) == [([], (-4.0, -8.0 - 2.0))] * 2


def _break_the_further_pass(rank: int, world: int) -> tuple[Any, ...]:
    engine = engine_over_terms(model=_Twice())
    for _ in range(2):
        step_with(engine, 1.0, 2.0)
    engine.backward(engine(64.0, 64.0))
    reduction = engine._parts.reduction
    with mock.patch.object(reduction, "finish", wraps=reduction.finish) as finish:
        if rank == 1:
            finish.side_effect = [MemoryError("no room"), mock.DEFAULT]
        error = caught(engine.step)
    before = weights(engine)
    engine.module.calls = 0
    return error, before, step_with(engine, 2.0, 4.0)


def test_what_breaks_the_further_pass_off_on_a_rank_is_raised_on_all() -> None:
    for error, before, after in ranks.shared(2, _break_the_further_pass):
        assert_told(error, StepError, "not applied on any rank", "rank 1: MemoryError: no room")
        assert (before, after) == ((-2.0, -4.0), (-4.0, -8.0))
