"""What an engine gives back: by `destroy`, however often, and when it is merely dropped."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from functools import partial
from typing import Any

import pytest
import torch

import ranks
from catching import assert_told, caught
from logged import log_lines
from models import Terms
from terms import engine_over_terms, step_with, weights
from training import at_stage
from zerort.errors import StepError

pytestmark = pytest.mark.timeout(120)
every_stage = pytest.mark.parametrize("stage", [0, 1, 2])


def _hooks(model: Any) -> int:
    return sum(
        len(parameter._post_accumulate_grad_hooks or ()) + len(parameter._backward_hooks or ())
        for parameter in model.parameters()
    )


def _use_after_destroy(rank: int, world: int, stage: int) -> None:
    model = Terms()
    engine = engine_over_terms(at_stage(stage), model=model)
    step_with(engine, 1.0, 2.0)
    pending = engine(1.0, 2.0)
    armed = engine(1.0, 2.0)
    engine.destroy()
    engine.destroy()
    assert _hooks(model) == 0
    pending.backward()
    engine(3.0, 4.0).backward()
    assert (model.a.grad[0].item(), _hooks(model)) == (4.0, 0)
    for call in (
        lambda: engine.backward(armed),
        engine.step,
        lambda: engine.save_checkpoint("never"),
        lambda: engine.load_checkpoint("never"),
        lambda: engine.join().__enter__(),
    ):
        assert_told(caught(call), StepError, "after engine.destroy()")
    assert weights(engine) == (-1.0, -2.0), "what can be read still can"
    assert engine.global_steps == 1
    engine = engine_over_terms(at_stage(stage), model=model)  # whose .grad is not the second's
    assert step_with(engine, 1.0, 2.0) == (-2.0, -4.0)


@every_stage
def test_a_destroyed_engine_leaves_the_module_alone(stage: int) -> None:
    ranks.run(2, _use_after_destroy, stage)


def _destroy_within(rank: int, world: int) -> None:
    model = Terms()
    engine = engine_over_terms(model=model)
    loss = engine(1.0, 2.0)
    loss.register_hook(lambda _: engine.destroy())
    loss.backward()
    assert _hooks(model) == 0
    assert_told(caught(engine.step), StepError, "after engine.destroy()")


def test_an_engine_can_be_destroyed_within_a_direct_backward() -> None:
    ranks.run(1, _destroy_within)


def _drop(rank: int, world: int, stage: int, steps: int) -> tuple[bool, int, float]:
    model = Terms()
    engine = engine_over_terms(at_stage(stage), model=model)
    for _ in range(steps):
        step_with(engine, 1.0, 2.0)
    pending = engine(1.0, 2.0)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    hooks = _hooks(model)
    pending.backward()
    return gone() is None, hooks + _hooks(model), model.b.grad[0].item()


@every_stage
@pytest.mark.parametrize("steps", [0, 3])
def test_an_engine_that_is_dropped_gives_its_hooks_back(stage: int, steps: int) -> None:
    assert ranks.run(2, _drop, stage, steps) == [(True, 0, 2.0)] * 2


def _trace(rank: int, world: int, folder: str) -> bool:
    path = f"{folder}/trace.json"
    engine = engine_over_terms({"zerort": {"trace": {"enabled": True, "path": path}}})
    step_with(engine, 1.0, 2.0)
    del engine
    gc.collect()
    with open(path) as file:
        return "backward" in file.read()


def test_an_engine_that_is_dropped_writes_its_trace(tmp_path: Any) -> None:
    assert ranks.run(1, _trace, str(tmp_path)) == [True]


def test_a_collected_engine_is_not_kept_by_a_backward_under_way() -> None:
    model = Terms()
    engine = engine_over_terms(model=model)
    engine(1.0, 2.0).backward()
    engine.step()
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert torch.equal(model.a.detach(), torch.full((4,), -1.0))


def _leave_a_pass_behind(rank: int, world: int, stage: int, raises: bool) -> float:
    """Both ranks have the first bucket's sums; rank 0's backward is over before the second's can
    be, and rank 1's when it has them: where sums are gathered, only rank 1 gathers these.
    """
    engine = engine_over_terms({**at_stage(stage), "zerort": {"timeout": 20}})
    step_with(engine, 1.0, 2.0)  # the first pass only observes
    last = torch.zeros(1, requires_grad=True) * 1.0  # its node runs behind the module's

    def linger(_: torch.Tensor) -> None:
        time.sleep(0.2)
        if raises and rank == 1:
            raise ArithmeticError("the user's own backward")

    last.register_hook(linger)
    if rank == 1:
        engine.module.a.register_hook(lambda _: time.sleep(0.7))  # `b` has left by then
    error = caught((engine(1.0, 2.0) + last.sum()).backward)
    assert (error is not None) == (raises and rank == 1)
    start = time.monotonic()
    engine.destroy()
    # the next one, which all ranks make together, while something still refers to the first
    again = engine_over_terms(at_stage(stage))
    again.destroy()
    return time.monotonic() - start


@every_stage
@pytest.mark.parametrize("raises", [False, True])
def test_what_a_backward_without_a_step_has_begun_keeps_no_rank_in_destroy(
    stage: int, raises: bool
) -> None:
    assert max(ranks.run(2, _leave_a_pass_behind, stage, raises, timeout=50)) < 10.0


def _destroy_beside_a_dead_rank(rank: int, world: int) -> float:
    engine = engine_over_terms({"zerort": {"timeout": 3}})
    step_with(engine, 1.0, 2.0)
    if rank == 1:
        raise SystemExit(3)
    engine(1.0, 2.0).backward()
    start = time.monotonic()
    engine.destroy()
    return time.monotonic() - start


def test_destroy_beside_a_rank_that_has_died_raises_nothing_and_ends_in_time() -> None:
    survivor, _ = ranks.attempt(2, _destroy_beside_a_dead_rank, timeout=40)
    assert isinstance(survivor, ranks.Returned), survivor
    assert survivor.value < 10.0


def _part_alone(rank: int, world: int) -> str:
    engine = engine_over_terms({**at_stage(2), "zerort": {"timeout": 20.0}})
    step_with(engine, 1.0, 2.0)
    heard = ""
    if rank == 0:
        heard = str(caught(lambda: step_with(engine, 1.0, 2.0)))
        engine.destroy()
    else:
        try:
            raise KeyError("batch 7")
        except KeyError:
            engine.destroy()
            time.sleep(3)  # the process goes on
    again = engine_over_terms(at_stage(2))
    step_with(again, 1.0, 2.0)
    again.destroy()
    return heard


def test_a_rank_that_gives_its_engine_back_for_an_exception_says_which_though_it_goes_on() -> None:
    heard, _ = ranks.run(2, _part_alone)
    assert "gave its engine back after KeyError: 'batch 7' (test_destroy.py:" in heard


def _until(place: str, engine: Any) -> Any:
    """A step, up to the place at which a rank fails; the loss."""
    if place == "before a forward":
        return None
    loss = engine(1.0, 2.0)
    if place != "before a backward":
        engine.backward(loss)
    return loss


def _go_on(place: str, engine: Any, loss: Any) -> None:
    match place:
        case "before a forward":
            engine(1.0, 2.0)
        case "before a backward":
            engine.backward(loss)
        case "before a step":
            engine.step()
        case "before an evaluation":
            with torch.no_grad():
                engine(1.0, 2.0)


def _part_at_stage_3(rank: int, world: int) -> dict[str, tuple[str, list[str]]]:
    found = {}
    for place in PLACES:
        settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        engine = engine_over_terms({**settings, "zerort": {"timeout": 20.0}})
        step_with(engine, 1.0, 2.0)
        loss = _until(place, engine)
        lines, heard = log_lines(logging.WARNING), ""
        if rank == 0 and place != "on all ranks":
            if place != "destroy()":
                heard = str(caught(partial(_go_on, place, engine, loss)))
            engine.destroy()
        else:
            try:
                raise KeyError(place)
            except KeyError:
                engine.destroy()
        found[place] = heard, list(lines)
    return found


PLACES = (
    "before a forward",
    "before a backward",
    "before a step",
    "before an evaluation",
    "destroy()",
    "on all ranks",
)


def test_at_stage_3_ranks_that_go_on_hear_the_exception_wherever_they_are() -> None:
    innocent, culprit = ranks.run(2, _part_at_stage_3)
    for place in PLACES[:-2]:
        heard, lines = innocent[place]
        assert f"gave its engine back after KeyError: '{place}' (test_destroy.py:" in heard, place
        assert lines == [], place
    assert [innocent[place] for place in PLACES[-2:]] == [("", [])] * 2
    assert [culprit[place] for place in PLACES] == [("", [])] * len(PLACES)


def _raise_in_a_direct_backward(rank: int, world: int) -> dict[str, str]:
    found = {}
    for case, raising in (("before it reduces", (0, 1)), ("on one rank", (1,))):
        settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        engine = engine_over_terms({**settings, "zerort": {"timeout": 20.0}})
        step_with(engine, 1.0, 2.0)
        loss = engine(1.0, 2.0)
        if rank in raising:
            last = engine.module.a if case == "on one rank" else loss
            last.register_hook(_raise)
            try:
                loss.backward()
            except ArithmeticError:
                engine.destroy()
            found[case] = ""
        else:
            loss.backward()
            found[case] = str(caught(engine.step))
            engine.destroy()
    return found


def _raise(_: torch.Tensor) -> None:
    raise ArithmeticError("the user's own backward")


def test_at_stage_3_a_direct_backward_that_raised_is_no_hindrance_to_destroy() -> None:
    innocent, culprit = ranks.run(2, _raise_in_a_direct_backward)
    assert culprit == {"before it reduces": "", "on one rank": ""}
    assert "gave its engine back after ArithmeticError" in innocent["on one rank"]
