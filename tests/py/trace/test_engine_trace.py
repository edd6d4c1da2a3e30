"""A real run's trace: what the file of each rank holds, and what listening costs.

Two ranks train a small GPT for a few steps at stage 2 with two micro-batches each, so that a bucket
lives twice a step.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from cases import CASES
from chrome_format import FLOAT_STEP_US, check, check_file
from training import Config, at_stage, config_of, engine_for, take_step
from zerort.start import observers
from zerort.trace.reader import lives, read, steps
from zerort.trace.summary import account

STEPS, GAS, WORLD = 3, 2, 2
BF16: Config = {"bf16": {"enabled": True}}

Event = dict[str, Any]


def record(rank: int, world: int, folder: str, changes: Config) -> list[tuple[int, int, str]]:
    """Trains with a trace; returns (padded elements, parameters, dtype) of every bucket."""
    case = CASES["gpt"]
    traced = {
        **changes,
        "zerort": {"trace": {"path": f"{folder}/trace-{{rank}}.json"}, "window": 3},
    }
    engine = engine_for(case, config_of(case, GAS, traced))
    for step in range(STEPS):
        take_step(engine, case, rank, step, GAS)
    buckets = [
        (bucket.numel, len(bucket.params), bucket.dtype)
        for bucket in engine._parts.reduction.plan.buckets
    ]
    engine.destroy()
    return buckets


class Run:
    """The files of one run, and the buckets that were planned."""

    def __init__(self, folder: Path, changes: Config) -> None:
        self.buckets = ranks.shared(WORLD, record, str(folder), changes)[0]
        self.paths = [folder / f"trace-{rank}.json" for rank in range(WORLD)]
        self.events = [check_file(path) for path in self.paths]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the run at a stage, once."""
    return cache(lambda stage: Run(tmp_path_factory.mktemp("traces"), {**at_stage(stage), **BF16}))


every_stage = pytest.mark.parametrize("stage", [0, 1, 2])


def track_names(events: list[Event]) -> dict[int, str]:
    return {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }


def spans(events: list[Event], track: str) -> list[Event]:
    """The spans of the tracks whose names begin so."""
    names = track_names(events)
    return [
        event for event in events if event["ph"] == "X" and names[event["tid"]].startswith(track)
    ]


def passes(stage: int) -> int:
    """How often all buckets travelled."""
    return STEPS * (GAS if stage == 2 else 1)


@every_stage
def test_the_main_track_shows_forward_backward_and_what_a_step_does(runs: Any, stage: int) -> None:
    for events in runs(stage).events:
        spanned = [event for event in spans(events, "main") if event["name"] != "wait"]
        names = [event["name"] for event in sorted(spanned, key=lambda event: event["ts"])]
        micro = ["forward", "backward", "step"]
        assert names == (micro * GAS + ["retire", "vote", "optimizer", "publish"]) * STEPS


@every_stage
def test_every_bucket_lives_once_a_pass_and_says_what_it_carries(runs: Any, stage: int) -> None:
    run = runs(stage)
    names = {name for name, _ in CASES["gpt"].seeded_model().named_parameters()}
    for events in run.events:
        found = lives(events)
        assert Counter(life.bucket for life in found) == dict.fromkeys(
            range(len(run.buckets)), passes(stage)
        )
        for life in found:
            numel, params, dtype = run.buckets[life.bucket]
            assert (life.args["bytes"], life.args["params"], life.args["dtype"]) == (
                2 * numel,
                params,
                dtype,
            )
            assert life.args["last"] in names
            assert min(life.phases) >= 0


def test_the_head_of_each_file_says_what_is_true_of_the_whole_run(runs: Any) -> None:
    first, second = (read(path).facts for path in runs(3).paths)
    assert {**first, "host": ""} == {**second, "host": ""}
    assert first["name"] != read(runs(1).paths[0]).facts["name"], "another run has another name"
    assert (first["world"], first["stage"], first["device"]) == (WORLD, 3, "cpu")
    assert (first["micro_batches"], first["window"]) == (GAS, 3)
    names = [name for name, _ in CASES["gpt"].seeded_model().named_parameters()]
    buckets = [value for fact, value in first.items() if fact.startswith("bucket ")]
    assert len(buckets) == len(runs(3).buckets)
    assert {end for ends in buckets for end in ends.split(" .. ")} <= set(names)
    assert sum(fact.startswith("unit ") for fact in first) > 1


@every_stage
def test_a_bucket_says_how_long_it_lacked_its_last_gradient_alone(runs: Any, stage: int) -> None:
    found = [life for events in runs(stage).events for life in lives(events)]
    assert all(0 <= life.args["alone_ms"] <= life.filling + 0.001 for life in found)
    several = [life for life in found if life.args["params"] > 1]
    assert any(life.args["alone_ms"] > 0 for life in several)
    assert any(life.args["alone_ms"] < life.filling / 2 for life in several)


@every_stage
def test_the_pages_own_picture_draws_each_phase_in_the_row_of_its_bucket(
    runs: Any, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "docs")
    draw = importlib.import_module("draw_step")
    run = runs(stage)
    drawn = draw.bars(run.events[0], 2)
    rows = {bar.row for bar in drawn}
    assert rows == {"loop", *(f"bucket {index}" for index in range(len(run.buckets)))}
    # at stage 0 a second collective follows the sum
    phases = {"filling", "in flight", *(["summing"] if stage else [])}
    assert {bar.name for bar in drawn} >= phases


@every_stage
def test_each_collective_of_a_bucket_is_a_span_with_its_bytes(runs: Any, stage: int) -> None:
    run = runs(stage)
    for events in run.events:
        seen = Counter(
            (event["name"], event["args"]["bytes"]) for event in spans(events, "collectives")
        )
        expected: Counter[tuple[str, int]] = Counter()
        for index, (numel, _, _) in enumerate(run.buckets):
            expected[f"reduce_scatter b{index}", 2 * numel] = passes(stage)
            expected[f"all_gather b{index}", 2 * numel] = STEPS
        assert seen == expected


def test_what_a_step_at_stage_3_waits_for_is_told_gathers_apart_from_sums(runs: Any) -> None:
    waits = [wait for events in runs(3).events for step in steps(events) for wait in step.waits]
    kinds = {re.sub(r" (of|for) .*", "", what) for what, ms in waits if ms > 0}
    assert {"all_gather", "roll call", "vote"} <= kinds, kinds
    assert all("unit" in what for what, _ in waits if what.startswith("all_gather"))


def test_a_unit_is_whole_from_its_gather_to_its_free(runs: Any) -> None:
    """Each of its all-gathers lies within a span of its own track, and none is left whole."""
    for events in runs(3).events:
        whole: dict[str, list[Event]] = {}
        for event in spans(events, "unit"):
            whole.setdefault(track_names(events)[event["tid"]], []).append(event)
        gathers = [e for e in spans(events, "collectives") if e["name"].startswith("all_gather")]
        assert len(whole) > 1 and gathers
        stretches = [(e["ts"], e["ts"] + e["dur"]) for each in whole.values() for e in each]
        for gather in gathers:
            since, until = gather["ts"], gather["ts"] + gather["dur"]
            assert any(start <= since and until <= end + 1 for start, end in stretches), gather
        for each in whole.values():
            ordered = sorted((e["ts"], e["dur"], e["args"]["bytes"]) for e in each)
            assert len({size for _, _, size in ordered}) == 1
            assert all(a[0] + a[1] <= b[0] + 1 for a, b in pairwise(ordered))


@every_stage
def test_spans_of_one_lane_do_not_overlap(runs: Any, stage: int) -> None:
    for events in runs(stage).events:
        rows: dict[int, list[Event]] = defaultdict(list)
        for event in spans(events, "collectives"):
            rows[event["tid"]].append(event)
        assert rows
        for row in rows.values():
            for before, after in pairwise(row):
                assert before["ts"] + before["dur"] <= after["ts"] + FLOAT_STEP_US


@every_stage
def test_counters_return_to_zero(runs: Any, stage: int) -> None:
    for events in runs(stage).events:
        values: dict[str, list[float]] = defaultdict(list)
        for event in events:
            if event["ph"] == "C":
                values[event["name"]] += event["args"].values()
        assert values.keys() == {"bytes in flight", "exposed communication"}
        for name, series in values.items():
            assert series[-1] == 0 < max(series), name
            assert min(series) == 0, name


def test_files_of_both_ranks_open_together(runs: Any) -> None:
    first, second = runs(2).events
    assert [{event["pid"] for event in events} for events in (first, second)] == [{0}, {1}]
    named = [event for event in first + second if event["ph"] == "M"]
    timed = sorted(
        (event for event in first + second if event["ph"] != "M"), key=lambda event: event["ts"]
    )
    check([*named, *timed])
    (start, end), (other_start, other_end) = (
        (min(times), max(times))
        for times in ([e["ts"] for e in events if "ts" in e] for events in (first, second))
    )
    assert max(start, other_start) < min(end, other_end), "the ranks' times do not lie on one axis"


@every_stage
def test_the_account_of_a_step_adds_up(runs: Any, stage: int) -> None:
    for path in runs(stage).paths:
        events = read(path).events
        assert [step.number for step in steps(events)] == [1, 2, 3]
        told = account(events)
        assert min(told.compute, told.exposed, told.optimizer, told.publish) > 0
        for step in steps(events):
            assert step.exposed + sum(step.parts.values()) <= step.wall + 0.01


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_a_life_tells_what_travels_and_not_what_is_trained(tmp_path: Path, wire: str) -> None:
    run = Run(tmp_path, {**at_stage(2), **BF16, "communication_data_type": wire})
    size, dtype = {"fp32": (4, "f32"), "bf16": (2, "bf16")}[wire]
    for events in run.events:
        for life in lives(events):
            assert (life.args["bytes"], life.args["dtype"]) == (
                size * run.buckets[life.bucket][0],
                dtype,
            )


# ---- what listening costs, counted


class Counting:
    """Stands in front of a sink and counts calls."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return value(*args, **kwargs)

        return counted


LAYERS = 8
BUCKETS = LAYERS + 1  # the first and the last are half as long


class Vectors(nn.Module):
    """`LAYERS` times `each` vectors; those of a layer fill a bucket."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(nn.Parameter(torch.zeros(16)) for _ in range(LAYERS * each))

    def forward(self) -> Tensor:
        return torch.stack([vector.sum() for vector in self.vectors]).sum()


def count_calls(rank: int, world: int, per_bucket: int, folder: str | None) -> Counter[str]:
    """Calls of the sink in one step of `BUCKETS` buckets of up to `per_bucket` parameters."""
    counting: list[Counting] = []

    def open_counting(*args: Any, **kwargs: Any) -> Counting:
        counting.append(Counting(opened(*args, **kwargs)))
        return counting[-1]

    opened = observers.open_sink
    observers.open_sink = open_counting  # type: ignore[assignment]
    model = Vectors(per_bucket)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 16 * per_bucket},
        "zerort": {"trace": {"path": folder and f"{folder}/trace-{{rank}}.json"}},
    }
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    sink = counting[0]
    for _ in range(2):
        sink.calls.clear()
        engine.backward(engine())
        engine.step()
    counts = sink.calls.copy()
    engine.destroy()
    return counts


def test_calls_of_the_sink_grow_with_buckets_and_not_with_parameters(tmp_path: Path) -> None:
    few, many = (
        ranks.shared(WORLD, count_calls, per_bucket, str(tmp_path))[0] for per_bucket in (2, 16)
    )
    assert few == many
    assert few["life"] == BUCKETS
    assert few["span"] == 2 * BUCKETS  # a reduce-scatter and an all-gather each
    assert few.total() <= 26 * BUCKETS


def test_without_a_trace_the_sink_hears_of_ranges_and_steps_only() -> None:
    for counts in ranks.shared(WORLD, count_calls, 16, None):
        assert counts == {"range": 7, "step": 1}


def test_a_trace_from_the_environment_needs_no_configuration(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("ZERORT_TRACE", str(tmp_path / "run.json"))
    engine = engine_for(CASES["mlp"], config_of(CASES["mlp"], 1))
    take_step(engine, CASES["mlp"], 0, 0)
    engine.destroy()
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert Counter(event["name"] for event in events if event["ph"] == "i") == {"step": 1}
