"""Backwards that an engine has not begun, and forwards within those that it has: which gradients
are its own, and by how much their loss was divided.

The weights are minus the sum of the mean gradients (see `Terms`), so a gradient that is lost, taken
twice or divided once more shows in them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ranks
from catching import assert_told, caught
from models import Terms
from terms import Weights, at_each_stage, engine_over_terms, step_with, weights
from training import at_stage, keep
from zerort.errors import StepError
from zerort.grads.tasks import GraphTask, LossScaling, announce, running_here

pytestmark = pytest.mark.timeout(120)
every_stage = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])

LIMIT = 40.0
CLEAN = (-2.0, -4.0)

# ---- a forward within a backward, and beside one


def _counts(engine: Any) -> tuple[int, int]:
    return engine.global_steps, engine.micro_steps


class _Layer(nn.Module):
    """(4,) -> (4,): times `a`, plus `b`, both zeros at first; its gradient by `b` is ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a + self.b


def checkpointing_recomputes_the_engine(rank: int, world: int) -> None:
    for reentrant in (False, True):
        for direct in (False, True):
            for gas in (1, 2):
                engine = engine_over_terms(accumulation=gas, model=_Layer())
                for _ in range(2 * gas):
                    x = torch.full((4,), 2.0, requires_grad=reentrant)
                    loss = checkpoint(engine, x, use_reentrant=reentrant).sum()
                    loss.backward() if direct else engine.backward(loss)
                    engine.step()
                where = f"reentrant {reentrant}, direct {direct}, {gas} steps"
                assert weights(engine) == (-4.0, -2.0), where
                assert _counts(engine) == (2, 2 * gas), where


def a_hook_evaluates_the_engine(rank: int, world: int) -> None:
    for grad in (False, True):
        for direct in (False, True):
            engine = engine_over_terms()

            def peek(_: Tensor, engine: Any = engine, grad: bool = grad) -> None:
                with torch.set_grad_enabled(grad):
                    engine(7.0, 7.0)

            for _ in range(2):
                loss = engine(1.0, 2.0)
                loss.register_hook(peek)
                engine.module.a.register_hook(peek)
                loss.backward() if direct else engine.backward(loss)
                engine.step()
            assert weights(engine) == CLEAN
            assert _counts(engine) == (2, 2)


def another_thread_evaluates(rank: int, world: int) -> None:
    for direct in (False, True):
        engine = engine_over_terms()
        stop, errors = threading.Event(), []

        def evaluate(engine: Any = engine, stop: Any = stop, errors: Any = errors) -> None:
            while not stop.is_set():
                with torch.set_grad_enabled(len(errors) % 2 == 0):
                    errors.append(caught(lambda: engine(5.0, 5.0)))

        thread = threading.Thread(target=evaluate)
        thread.start()
        for _ in range(20):
            loss = engine(1.0, 2.0)
            loss.backward() if direct else engine.backward(loss)
            engine.step()
        stop.set()
        thread.join()
        assert weights(engine) == (-20.0, -40.0)
        assert _counts(engine) == (20, 20)
        assert set(errors) == {None}


def a_training_call_within_a_backward_is_refused_and_told_to_all(rank: int, world: int) -> None:
    for direct in (False, True):
        engine = engine_over_terms()
        loss = engine(64.0, 64.0)
        engine.module.a.register_hook(lambda _, engine=engine: engine.step() if rank == 1 else None)
        error = caught(partial(torch.Tensor.backward if direct else engine.backward, loss))
        if rank == 1:
            assert_told(error, StepError, "step() ", "backward")
        else:
            assert_told(caught(engine.step), StepError, "rank 1")
        engine.module.a._backward_hooks.clear()
        assert step_with(engine, 2.0, 4.0) == CLEAN


def a_gradient_that_is_only_computed_begins_nothing(rank: int, world: int) -> None:
    engine = engine_over_terms()
    loss = engine(1.0, 2.0)
    torch.autograd.grad(loss, list(engine.module.parameters()), retain_graph=True)
    engine.backward(loss)
    engine.step()
    assert weights(engine) == (-1.0, -2.0) and _counts(engine) == (1, 1)


SCENARIOS: list[Callable[[int, int], None]] = [
    checkpointing_recomputes_the_engine,
    a_hook_evaluates_the_engine,
    another_thread_evaluates,
    a_training_call_within_a_backward_is_refused_and_told_to_all,
    a_gradient_that_is_only_computed_begins_nothing,
]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_forwards_within_a_backward(scenario: Callable[[int, int], None], stage: int) -> None:
    if stage == 3 and scenario is another_thread_evaluates:
        pytest.skip("refused at stage 3, see params/test_stage_3_failures.py")
    ranks.shared(2, at_each_stage, stage, scenario, timeout=LIMIT)


# ---- outputs that hide their tensors

Pair = namedtuple("Pair", "main extra")


@dataclass
class Record:
    main: Tensor
    extra: Any = None


class Slotted:
    __slots__ = ("main",)

    def __init__(self, main: Tensor) -> None:
        self.main = main


class Sealed:
    """Shows its tensor through a call alone."""

    def __init__(self, main: Tensor) -> None:
        self.get = lambda: main


SHAPES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda o: o),
    "tuple in a dict": (lambda t: {"x": (t, 1)}, lambda o: o["x"][0]),
    "named tuple": (lambda t: Pair(t, None), lambda o: o.main),
    "dataclass": (Record, lambda o: o.main),
    "dataclass in a dataclass": (lambda t: Record(t.detach(), Record(t)), lambda o: o.extra.main),
    "slots": (Slotted, lambda o: o.main),
    "ordered dict": (lambda t: OrderedDict(main=t), lambda o: o["main"]),
    "list in an object": (lambda t: Record(t.detach(), [t]), lambda o: o.extra[0]),
    "closure": (Sealed, lambda o: o.get()),
}


class _Wrapping(Terms):
    shape = "tensor"

    def forward(self, a: float, b: float) -> Any:  # type: ignore[override]
        return SHAPES[self.shape][0](super().forward(a, b))


def _hide(rank: int, world: int, stage: int) -> dict[str, tuple[Weights, int]]:
    found = {}
    for shape in [*SHAPES, "raw module"]:
        for gas in (1, 2):
            model = _Wrapping()
            model.shape = "tensor" if shape == "raw module" else shape
            engine = engine_over_terms(at_stage(stage), gas, model=model)
            forward = engine.module if shape == "raw module" else engine
            for _ in range(2 * gas):
                SHAPES[model.shape][1](forward(1.0 + rank, 4.0)).backward()
                engine.step()
            found[f"{shape}, {gas} steps"] = weights(engine), engine.global_steps
            keep(engine)
    return found


@every_stage
def test_a_direct_backward_is_found_whatever_the_outputs_are_in(stage: int) -> None:
    for found in ranks.shared(2, _hide, stage, timeout=60):
        assert {what: got for what, got in found.items() if got != ((-3.0, -8.0), 2)} == {}


def _hide_from_the_loss_scale(rank: int, world: int) -> tuple[Exception | None, Weights]:
    model = _Wrapping()
    model.shape = "closure"
    engine = engine_over_terms({"fp16": {"enabled": True, "loss_scale": 4.0}}, model=model)
    engine(64.0, 64.0).get().backward()
    error = caught(engine.step)
    engine.backward(engine(2.0, 4.0).get())
    engine.step()
    return error, weights(engine)


def test_a_direct_backward_that_no_hook_told_of_is_not_taken_unscaled() -> None:
    for error, after in ranks.shared(2, _hide_from_the_loss_scale, timeout=LIMIT):
        assert_told(error, StepError, "would not be loss-scaled")
        assert after == CLEAN


def _scale_what_is_not_of_the_engine(rank: int, world: int) -> dict[str, Weights]:
    """The module is called itself, so that its outputs tell nothing of a backward."""
    found = {}
    for stage in (0, 1, 2, 3):
        for name, section in PRECISIONS.items():
            engine = engine_over_terms({**at_stage(stage), **section}, 2)
            for _ in range(4):
                engine.scale(engine.module(2.0, 4.0)).backward()
                engine.step()
            found[f"{stage}, {name}"] = weights(engine)
            keep(engine)
    return found


def test_a_scaled_loss_is_divided_once_wherever_it_was_computed() -> None:
    for found in ranks.shared(2, _scale_what_is_not_of_the_engine, timeout=LIMIT):
        assert set(found.values()) == {(-4.0, -8.0)}, found


# ---- one loss through two engines

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16, 4": {"fp16": {"enabled": True, "loss_scale": 4.0}},
    "fp16, 16": {"fp16": {"enabled": True, "loss_scale": 16.0}},
    "bf16": {"bf16": {"enabled": True}},
}
COMBINED = [
    ("fp32", "fp32"),
    ("fp16, 4", "fp16, 16"),
    ("fp16, 16", "fp32"),
    ("bf16", "fp16, 4"),
]


def _share_a_loss(rank: int, world: int, stage: int) -> dict[str, tuple[Weights, Weights]]:
    """`a` divides by its own steps what `b` has divided by its own, or nobody."""
    found = {}
    for of_a, of_b in COMBINED:
        for gas in (1, 2):
            for way in ("engine", "scale", "direct"):
                if way == "direct" and (of_a, of_b) != ("fp32", "fp32"):
                    continue
                a = engine_over_terms({**at_stage(stage), **PRECISIONS[of_a]}, gas, model=Terms())
                b = engine_over_terms({**at_stage(stage), **PRECISIONS[of_b]}, gas, model=Terms())
                for _ in range(2 * gas):
                    loss = a(1.0 + rank, 4.0).float() + b(2.0, 8.0).float()
                    if way == "engine":
                        b.backward(loss)
                    elif way == "scale":
                        b.scale(loss).backward()
                    else:
                        loss.backward()
                    b.step()
                    a.step()
                found[f"{of_a} with {of_b}, {gas} steps, {way}"] = weights(a), weights(b)
                keep(a)
                keep(b)
    return found


@every_stage
def test_one_loss_trains_two_engines_by_the_steps_and_the_scale_of_each(stage: int) -> None:
    # Fresh ranks: shared ones keep their engines, and stage 3 has room for 62.
    for found in ranks.run(2, _share_a_loss, stage, timeout=90):
        right = ((-3.0, -8.0), (-4.0, -16.0))
        assert {what: got for what, got in found.items() if got != right} == {}


def _share_with_other_steps(rank: int, world: int, stage: int) -> tuple[Weights, Weights]:
    a = engine_over_terms(at_stage(stage), 4)
    b = engine_over_terms(at_stage(stage), 2)
    for _ in range(4):
        b.backward(a(1.0, 4.0) + b(2.0, 8.0))
        b.step()
        a.step()
    return weights(a), weights(b)


@every_stage
def test_each_engine_divides_by_its_own_steps(stage: int) -> None:
    assert (
        ranks.shared(2, _share_with_other_steps, stage, timeout=LIMIT)
        == [((-1.0, -4.0), (-4.0, -16.0))] * 2
    )


class _Fragile(Terms):
    def forward(self, a: float, b: float, breaks: bool = False) -> Tensor:  # type: ignore[override]
        loss = super().forward(a, b)
        if breaks:
            self.a.register_hook(_break)
        return loss


def _break(_: Tensor) -> None:
    raise ArithmeticError("the user's own backward")


def _break_in_anothers_backward(rank: int, world: int, stage: int) -> tuple[Any, ...]:
    """`a` has a part of its gradients on rank 1 when `b`'s backward raises in it."""
    a = engine_over_terms(at_stage(stage), model=_Fragile())
    b = engine_over_terms(at_stage(stage))
    loss = a(64.0, 64.0, breaks=rank == 1) + b(64.0, 64.0)
    first = caught(lambda: b.backward(loss))
    second = caught(b.step)
    third = caught(a.step)
    a.module.a._backward_hooks = None
    return first, second, third, step_with(a, 2.0, 4.0), step_with(b, 2.0, 4.0)


@every_stage
def test_a_backward_of_another_engine_that_raised_is_not_taken(stage: int) -> None:
    innocent, culprit = ranks.shared(2, _break_in_anothers_backward, stage, timeout=LIMIT)
    assert innocent[0] is None and isinstance(culprit[0], ArithmeticError)
    assert_told(innocent[1], StepError, "rank 1", "the user's own backward")
    assert_told(innocent[2], StepError, "rank 1")
    assert_told(culprit[2], StepError, "raised")
    assert innocent[3:] == culprit[3:] == (CLEAN, CLEAN)


# ---- the loop of a GAN


def _adversaries(rank: int, world: int, stage: int) -> dict[str, tuple[Weights, Weights]]:
    """The critic learns by two backwards, the generator through the critic."""
    found = {}
    for forward in ("engine", "module"):
        for drop in ("module", "engine", "freeze"):
            for direct in (False, True):
                if direct and (forward, drop) == ("engine", "module"):
                    continue  # reduced by then, as docs/migration.md says
                generator = engine_over_terms(at_stage(stage))
                critic = engine_over_terms(at_stage(stage))
                call = critic if forward == "engine" else critic.module
                for _ in range(3):
                    if drop != "freeze":
                        (critic.module if drop == "module" else critic).zero_grad()
                    critic.backward(call(1.0 + rank, 2.0))
                    critic.backward(call(1.0, 1.0))
                    critic.step()
                    critic.module.requires_grad_(drop != "freeze")
                    loss = generator(1.0, 2.0) + call(64.0, 64.0)
                    loss.backward() if direct else generator.backward(loss)
                    generator.step()
                    critic.module.requires_grad_(True)
                key = f"forward through the {forward}, dropped by {drop}, direct {direct}"
                found[key] = weights(generator), weights(critic)
                keep(generator)
                keep(critic)
    return found


@every_stage
def test_a_generator_learns_through_a_critic_that_does_not(stage: int) -> None:
    for found in ranks.shared(2, _adversaries, stage, timeout=60):
        right = ((-3.0, -6.0), (-7.5, -9.0))
        assert {what: got for what, got in found.items() if got != right} == {}


# ---- what autograd is asked


def test_a_graph_task_runs_until_it_is_over_or_has_raised() -> None:
    for breaks in (False, True):
        ended: list[str] = []
        tasks: list[GraphTask] = []
        w = torch.ones(2, requires_grad=True)
        loss = (w * 2).sum()
        if breaks:
            w.register_hook(_break)

        def enter(_: Tensor, tasks: Any = tasks, ended: Any = ended) -> None:
            tasks.append(GraphTask(lambda: ended.append("over")))
            assert tasks[0].runs

        loss.register_hook(enter)
        error = caught(loss.backward)
        assert (error is not None) == breaks
        assert ended == ([] if breaks else ["over"])
        assert not tasks[0].runs


def test_a_backward_is_its_engines_own_also_where_it_runs_another_one_inside() -> None:
    seen: list[int | None] = []
    owner, w = object(), torch.ones(2, requires_grad=True)

    def look(_: Tensor) -> None:
        running = running_here(owner)
        seen.append(running.scaling.steps if running is not None else None)

    def inner(x: Tensor) -> Tensor:
        y = x * w
        if y.requires_grad:
            y.register_hook(look)
        return y

    loss = checkpoint(inner, torch.ones(2, requires_grad=True), use_reentrant=True).sum()
    announce(loss, owner, LossScaling(2, 4.0), by_call=True)
    loss.backward()
    assert seen == [2]
    assert running_here(owner) is None
    loss = (w * 2).sum()
    loss.register_hook(look)
    loss.backward()
    assert seen == [2, None], "a backward that nobody announced, on the same thread"
