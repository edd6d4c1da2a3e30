"""`wall_clock_breakdown`: what each timer takes, on which rank, and that none costs a thing off."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
from models import Terms
from terms import engine_over_terms, step_with
from training import at_stage, keep
from zerort.features.stopwatch import Stopwatches
from zerort.features.timers import TIMERS

pytestmark = pytest.mark.timeout(120)

PAUSE = 0.25  # seconds; far more than a step takes on a loaded machine
MS = 1000 * PAUSE
ON = {"wall_clock_breakdown": True}


class Slow(Terms):
    """Sleeps where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.where = ""

    def forward(self, a: float | None = None, b: float | None = None) -> Tensor:
        if self.where == "forward":
            time.sleep(PAUSE)
        loss = super().forward(a, b)
        if self.where == "backward":
            loss.register_hook(lambda gradient: time.sleep(PAUSE))
        return loss


class SlowSgd(torch.optim.SGD):
    slow = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.slow:
            time.sleep(PAUSE)
        super().step(closure)


def engine_of(gas: int = 1, **config: Any) -> Any:
    model = Slow()
    optimizer = SlowSgd(model.parameters(), lr=1.0)
    engine = engine_over_terms({**ON, **config}, gas, model=model, optimizer=optimizer)
    keep(engine)
    return engine


def timed(engine: Any, micro: bool = False) -> dict[str, float]:
    found = engine.get_wall_clock_timers()
    return {name: found[f"{name}_microstep" if micro else name] for name in TIMERS}


def places(rank: int, world: int, stage: int) -> dict[str, Any]:
    """Timers of steps in which something sleeps: on this rank, or on rank 1 alone."""
    engine = engine_of(**at_stage(stage))
    found: dict[str, Any] = {"before": engine.get_wall_clock_timers()}
    step_with(engine, 1.0, 1.0)  # slower than the others
    for where in ("forward", "backward"):
        engine.module.where = where
        step_with(engine, 1.0, 1.0)
        found[where] = timed(engine)
    engine.module.where = "backward" if rank == 1 else ""
    step_with(engine, 1.0, 1.0)
    found["a slow peer"] = timed(engine)
    engine.module.where = ""
    engine.optimizer.slow = True
    engine.backward(engine(1.0, 1.0))
    engine.step()
    found["step"] = timed(engine)
    found["readings"] = dict(engine._events.readings())
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_each_part_is_charged_with_what_it_takes(stage: int) -> None:
    for rank, found in enumerate(ranks.run(2, places, stage)):
        assert found["before"] == {}
        assert found["forward"]["fwd"] > MS > found["forward"]["bwd"]
        assert found["backward"]["bwd_inner"] > MS > found["backward"]["fwd"]
        assert found["step"]["step"] > MS > found["step"]["bwd"]
        waits, other = ("bwd_inner", "bwd_allreduce") if rank else ("bwd_allreduce", "bwd_inner")
        assert found["a slow peer"][waits] > 0.8 * MS > found["a slow peer"][other]
        for times in (found["forward"], found["step"], found["a slow peer"]):
            assert times["bwd"] == pytest.approx(times["bwd_inner"] + times["bwd_allreduce"])
            assert min(times.values()) >= 0
        assert set(found["readings"]) == {
            f"Train/Samples/elapsed_time_ms_{name}"
            for name in ("forward", "backward", "backward_inner", "backward_allreduce", "step")
        }


def test_a_window_is_the_sum_of_its_micro_batches_and_the_next_begins_anew() -> None:
    engine = engine_of(gas=3)
    engine.module.where = "forward"
    sums = dict.fromkeys(TIMERS, 0.0)
    for _ in range(3):
        step_with(engine, 1.0, 1.0)
        for name, took in timed(engine, micro=True).items():
            sums[name] += took
        assert timed(engine) == pytest.approx(sums)
    assert timed(engine)["fwd"] > 3 * MS
    step_with(engine, 1.0, 1.0)
    assert timed(engine) == timed(engine, micro=True)
    assert engine.timers("fwd").elapsed(reset=False) == timed(engine)["fwd"]


def test_a_window_that_fails_is_over_too() -> None:
    engine = engine_of()
    engine.module.where = "forward"
    with pytest.raises(Exception, match="no graph"):
        engine.backward(engine(1.0, 1.0).detach())
    engine.step()
    engine.module.where = ""
    step_with(engine, 1.0, 1.0)
    assert timed(engine)["fwd"] < MS


def test_timers_of_the_users_own_count_laps_and_do_nothing_when_off() -> None:
    timers = engine_of().timers
    load = timers("load")
    for _ in range(2):
        load.start()
        time.sleep(0.01)
        load.stop()
    assert load.elapsed(reset=False) >= 20 and load.mean() == pytest.approx(
        load.elapsed(reset=False) / 2
    )
    assert timers("load") is load and timers.get_timers()["load"] is load
    assert timers.get_mean(["load", "none"]) == {"load": load.mean()}
    load.elapsed()
    assert load.elapsed() == 0.0
    off = Stopwatches(enabled=False)
    off("load").start()
    off("load").stop()
    assert off("load").elapsed() == 0.0 and off.get_timers() == {}


FILES = ("features/timers.py", "features/stopwatch.py", "trace/breakdown.py")


def calls_in(files: tuple[str, ...], run: Callable[[], object]) -> Counter[str]:
    """How often a function of one of these files is called in `run`."""
    found: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(files):
            found[frame.f_code.co_qualname if sys.version_info >= (3, 11) else "called"] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_off_no_line_of_it_runs_in_a_step() -> None:
    off, on = engine_over_terms(), engine_of()
    keep(off)
    for engine in (off, on):
        step_with(engine, 1.0, 1.0)
    assert calls_in(FILES, lambda: step_with(off, 1.0, 1.0)) == {}
    assert calls_in(FILES, lambda: step_with(on, 1.0, 1.0))
    assert off.get_wall_clock_timers() == {} and off.timers("fwd").elapsed() == 0.0
