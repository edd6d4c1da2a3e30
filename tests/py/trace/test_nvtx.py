"""Ranges on a device's timeline: named, nested, and ended whatever raises."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Terms
from terms import engine_over_terms, step_with
from training import at_stage, keep
from zerort.device import markers
from zerort.device.markers import Markers, markers_of
from zerort.errors import StepError
from zerort.start import observers
from zerort.utils import instrument_w_nvtx

pytestmark = pytest.mark.timeout(120)

# the package's function stands before the module of its name
nvtx_module = sys.modules["zerort.utils.nvtx"]


class Timeline:
    """A fake pair; what was pushed stands with its depth."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[int, str]] = []

    def push(self, name: str) -> int:
        self.seen.append((len(self.open), name))
        self.open.append(name)
        return len(self.open)

    def pop(self) -> int:
        self.open.pop()
        return len(self.open)

    @property
    def pair(self) -> Markers:
        return Markers(self.push, self.pop)


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    timeline = Timeline()
    monkeypatch.setattr(observers, "markers_of", lambda device: timeline.pair)
    return timeline


class Fails(Terms):
    """Raises in its forward or backward when told to."""

    where = ""

    def forward(self, a: float | None = None, b: float | None = None) -> Tensor:
        if self.where == "forward":
            raise ZeroDivisionError("forward")
        loss = super().forward(a, b)
        if self.where == "backward":
            loss.register_hook(lambda gradient: 1 / 0)
        return loss


class FailingSgd(torch.optim.SGD):
    fails = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.fails:
            raise ZeroDivisionError("optimizer")
        super().step(closure)


def engine_of(stage: int = 1, **config: Any) -> Any:
    model = Fails()
    optimizer = FailingSgd(model.parameters(), lr=1.0)
    engine = engine_over_terms({**at_stage(stage), **config}, model=model, optimizer=optimizer)
    keep(engine)
    return engine


def test_a_step_is_its_named_ranges_one_in_the_other(timeline: Timeline) -> None:
    step_with(engine_of(), 1.0, 1.0)
    assert timeline.seen == [
        (0, "zerort.forward"),
        (0, "zerort.backward"),
        (0, "zerort.step"),
        (1, "zerort.retire"),
        (1, "zerort.vote"),
        (1, "zerort.optimizer"),
        (1, "zerort.publish"),
    ]
    assert timeline.open == []


@pytest.mark.parametrize("stage", [0, 3])
def test_what_raises_leaves_no_range_open(timeline: Timeline, stage: int) -> None:
    engine = engine_of(stage)
    step_with(engine, 1.0, 1.0)
    engine.module.where = "forward"
    with pytest.raises(ZeroDivisionError):
        engine(1.0, 1.0)
    assert timeline.open == []
    engine.module.where = ""
    if stage == 3:
        engine.backward(engine(1.0, 1.0))
        engine.step()
    engine.module.where = "backward"
    loss = engine(1.0, 1.0)
    with pytest.raises(ZeroDivisionError):
        engine.backward(loss)
    assert timeline.open == []
    engine.step()
    engine.module.where = ""
    engine.backward(engine(1.0, 1.0))
    engine.optimizer.fails = True
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert timeline.open == []
    with pytest.raises(StepError):
        engine.step()
    assert timeline.open == [] and (1, "zerort.publish") in timeline.seen


def test_beside_timers_and_the_profiler_they_stay(timeline: Timeline) -> None:
    with torch.profiler.profile() as profile:
        engine = engine_of(wall_clock_breakdown=True)
        step_with(engine, 1.0, 1.0)
    names = {event.key for event in profile.key_averages()}
    assert {"forward", "backward", "step", "vote", "optimizer", "publish", "retire"} <= names
    assert len(timeline.seen) == 7 and engine.get_wall_clock_timers()["fwd"] > 0


def test_a_decorated_function_is_a_range_of_its_name_also_where_it_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeline = Timeline()
    monkeypatch.setattr(nvtx_module, "default_markers", lambda: timeline.pair)

    @instrument_w_nvtx
    def divide(a: float, *, by: float) -> float:
        """Divides."""
        assert timeline.open
        return a / by

    assert divide(4.0, by=2.0) == 2.0 and divide.__doc__ == "Divides."
    with pytest.raises(ZeroDivisionError):
        divide(1.0, by=0.0)
    assert timeline.open == [] and len(timeline.seen) == 2
    assert timeline.seen[0][1].endswith("<locals>.divide")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(AssertionError):
        divide(1.0, by=1.0)


def test_without_cuda_there_are_none() -> None:
    assert markers_of(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert markers.default_markers() is None
        assert instrument_w_nvtx(lambda: 3)() == 3
