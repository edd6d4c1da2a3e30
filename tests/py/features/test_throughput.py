"""`engine.tput_timer`: samples a second between boundaries, and the line of progress."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_timers import calls_in
from torch import nn

from logged import log_lines
from terms import engine_over_terms, step_with
from training import keep
from zerort.features import throughput
from zerort.step.events import Crossing

pytestmark = pytest.mark.timeout(120)


def engine_of(gas: int = 1, **config: Any) -> Any:
    engine = engine_over_terms({"train_micro_batch_size_per_gpu": 4, **config}, gas)
    keep(engine)
    return engine


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def test_the_batch_of_all_ranks_over_the_time_between_boundaries(clock: Clock) -> None:
    engine = engine_of(gas=2)
    timer = engine.tput_timer
    assert timer.batch_size == 8 and timer.avg_samples_per_sec() == float("-inf")
    for step in range(4):
        for _ in range(2):
            clock.now += 1.0 + step
            step_with(engine, 1.0, 1.0)
        if step < 2:
            assert timer.avg_samples_per_sec() == float("-inf") and timer.current is None
    assert timer.current == 8 / 8 and timer.global_step_count == 4
    assert timer.avg_samples_per_sec() == 16 / (6 + 8) and timer.total_elapsed_time == 14


def test_what_is_between_stop_and_start_does_not_count(clock: Clock) -> None:
    engine = engine_of()
    timer = engine.tput_timer
    for _ in range(3):
        clock.now += 2.0
        timer.stop()
        timer.stop(global_step=True, report_speed=False)
        clock.now += 50.0
        timer.start()
        timer.start()
        step_with(engine, 1.0, 1.0)
    assert timer.current == 4 / 2 and timer.global_step_count == 3


def test_epochs_are_counted_by_the_caller() -> None:
    engine = engine_of(gas=2)
    step_with(engine, 1.0, 1.0)
    assert (engine.tput_timer.epoch_count, engine.tput_timer.micro_step_count) == (0, 1)
    engine.tput_timer.update_epoch_count()
    step_with(engine, 1.0, 1.0)
    step_with(engine, 1.0, 1.0)
    assert (engine.tput_timer.epoch_count, engine.tput_timer.micro_step_count) == (1, 2)


def test_lines_of_progress_have_the_speed_and_tokens_where_their_number_is_known() -> None:
    engine = engine_of(steps_per_print=1)
    assert engine.tput_timer.steps_per_output == 1
    lines = log_lines()
    for _ in range(3):
        step_with(engine, 1.0, 1.0)
    engine.tput_timer.tokens_per_sample = 10
    step_with(engine, 1.0, 1.0)
    progress = [line for line in lines if line.startswith("step=")]
    assert ["samples/s" in line for line in progress] == [False, False, True, True]
    samples, tokens = re.search(r"samples/s=([\d.]+) .*tokens/s=([\d.]+)", progress[3]).groups()  # type: ignore[union-attr]
    assert float(tokens) == pytest.approx(10 * float(samples), rel=1e-2)


def test_a_loaded_counter_is_no_sample_of_this_run(tmp_path: Path) -> None:
    engine = engine_of()
    for _ in range(5):
        step_with(engine, 1.0, 1.0)
    engine.save_checkpoint(tmp_path)
    resumed = engine_of()
    resumed.load_checkpoint(tmp_path)
    for _ in range(3):
        step_with(resumed, 1.0, 1.0)
        time.sleep(0.001)
    assert resumed.tput_timer.batch_size == 4
    assert resumed.tput_timer.micro_step_count == 3


def test_off_no_line_of_it_runs_and_on_it_is_one_call_a_boundary() -> None:
    off = engine_of(timers={"throughput": {"enabled": False}})
    on = engine_of(gas=2)
    for engine in (off, on):
        step_with(engine, 1.0, 1.0)
    files = ("features/throughput.py",)
    assert calls_in(files, lambda: step_with(off, 1.0, 1.0)) == {}
    assert sum(calls_in(files, lambda: step_with(on, 1.0, 1.0)).values()) == 2
    assert calls_in(files, lambda: step_with(on, 1.0, 1.0)) == {}
    off.tput_timer.start()
    off.tput_timer.update_epoch_count()
    assert off.tput_timer.avg_samples_per_sec() == float("-inf")
    assert Crossing(1, 1, True).applied


def test_behind_a_profiled_step_lines_have_the_share_of_the_peak() -> None:
    profiler = {"enabled": True, "profile_step": 0, "output_file": None}
    engine = engine_over_terms(
        {
            "train_micro_batch_size_per_gpu": 4,
            "steps_per_print": 1,
            "flops_profiler": profiler,
            "zerort": {"peak_flops": 1e6},
        },
        model=Products(),
    )
    keep(engine)
    lines = log_lines()
    for _ in range(4):
        engine.backward(engine(torch.ones(4, 8)))
        engine.step()
    line = [line for line in lines if line.startswith("step=")][3]
    samples, share = re.search(r"samples/s=([\d.]+) .*MFU=([\d.]+)%", line).groups()  # type: ignore[union-attr]
    # forward 2 x 8 x 8 flops a sample, and twice that in the backward
    assert float(share) == pytest.approx(float(samples) * 3 * 128 / 1e6 * 100, rel=1e-2, abs=0.06)


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x).square().mean()
