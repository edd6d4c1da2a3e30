"""`comms_logger`: counts and bytes are the plan's, latencies are waits, bandwidths by formula."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from test_timers import calls_in

import ranks
from logged import log_lines
from terms import engine_over_terms, step_with
from training import at_stage, keep
from zerort.features.communication import _written
from zerort.trace.communication import CommunicationWatch, Record, bandwidths

pytestmark = pytest.mark.timeout(120)

STEPS = 3


def engine_of(rank: int, stage: int, **settings: Any) -> Any:
    config = {
        "comms_logger": {"enabled": True, **settings},
        **at_stage(stage, reduce_bucket_size=1),
    }
    engine = engine_over_terms(config)
    keep(engine)
    return engine


def summaries(rank: int, world: int, stage: int) -> dict[str, Any]:
    lines = log_lines()
    engine = engine_of(rank, stage)
    for _ in range(STEPS):
        engine.backward(engine(1.0, 2.0))
        engine.step()
    buckets = engine._parts.boundary.flat.buckets
    only = engine_of(rank, stage, prof_all=False, prof_ops=["all_gather_into_tensor"])
    loud = engine_of(rank, stage, verbose=True)
    for each in (only, loud):
        each.backward(each(1.0, 2.0))
        each.step()
    return {
        "all": engine.communication_summary(),
        "bytes": {4 * bucket.spec.shard_numel for bucket in buckets},
        "buckets": len(buckets),
        "only": set(only.communication_summary()["summary"]),
        "lines": [line for line in lines if line.startswith("comm op: ")],
        "sentinels": engine._parts.reduction.listener._sentinels,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_counts_and_bytes_are_the_plans(stage: int) -> None:
    for rank, found in enumerate(ranks.run(2, summaries, stage)):
        summary = found["all"]["summary"]
        assert set(summary) == {"reduce_scatter", "all_gather"}
        for operation, sizes in summary.items():
            assert set(sizes) == found["bytes"]
            times = STEPS * found["buckets"]
            counted = sum(row["count"] for row in sizes.values())
            # at stage 3 parameters are gathered for each use, forward and backward
            assert counted == times or (stage == 3 and operation == "all_gather" and counted)
            for size, row in sizes.items():
                assert row["msg_size_bytes"] == size and row["total_latency_ms"] > 0
                assert 0 < row["avg_latency_ms"] <= row["total_latency_ms"]
                assert row["busbw_avg_gbps"] == pytest.approx(row["tput_avg_gbps"] / 2)
        assert found["all"]["straggler_analysis"] is None
        metadata = found["all"]["metadata"]
        assert (metadata["world_size"], metadata["rank"]) == (2, rank)
        assert found["only"] == {"all_gather"}
        assert bool(found["lines"]) is (rank == 0)
        assert all("busbw (Gbps)" in line for line in found["lines"])
        assert found["sentinels"]  # it costs no hook


def test_bandwidths_follow_deepspeeds_formulas() -> None:
    megabit = 10**6 // 8
    assert bandwidths("all_reduce", megabit, 1.0, 4) == (2.0, 1.5)
    assert bandwidths("all_gather", megabit, 1.0, 4) == (4.0, 3.0)
    assert bandwidths("reduce_scatter", megabit, 2.0, 4) == (2.0, 1.5)
    assert bandwidths("all_to_all", megabit, 1.0, 4) == (1.0, 0.75)
    assert bandwidths("broadcast", megabit, 1.0, 4) == (1.0, 1.0)
    assert bandwidths("broadcast", megabit, 0.0, 4) == (0.0, 0.0)


def test_an_average_leaves_out_a_tenth_at_either_end() -> None:
    assert Record(10, 0.0, deque([100.0, *[2.0] * 8, 0.0])).average_ms == 2.0
    assert Record(2, 0.0, deque([1.0, 3.0])).average_ms == 2.0
    assert Record().average_ms == 0.0


def test_sizes_are_written_as_deepspeed_writes_them() -> None:
    assert [_written(size) for size in (0, 512, 1536, 3 * 1024**3)] == [
        "0.0 B",
        "512.0 B",
        "1.5 KB",
        "3.0 GB",
    ]


class Event:
    """An event on a device's stream."""

    def __init__(self, at: float) -> None:
        self.at, self.passed = at, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        raise AssertionError("the host waits for the device")

    def elapsed_time(self, end: Any) -> float:
        return float(end.at - self.at)


def test_on_a_device_an_event_is_read_when_it_has_passed_and_never_waited_for() -> None:
    events = [Event(at) for at in (1.0, 4.0, 5.0, 9.0)]
    moments = iter(events)
    watch = CommunicationWatch(2, None, lambda: next(moments))
    for name in ("reduce_scatter b0", "reduce_scatter b1"):
        watch.started(name, 64, None)  # type: ignore[arg-type]
        watch.landed(name)
    ((_, record),) = watch.records().items()
    assert (record.count, record.total_ms) == (2, 0.0)
    events[1].passed = True
    assert watch.records()["reduce_scatter", 32].total_ms == 3.0
    events[3].passed = True
    assert watch.records()["reduce_scatter", 32].total_ms == 7.0
    watch.landed("of nobody")


def test_off_no_line_of_it_runs_in_a_step() -> None:
    off = engine_over_terms()
    on = engine_of(0, 0)
    for engine in (off, on):
        keep(engine)
        step_with(engine, 1.0, 1.0)
    files = ("trace/communication.py", "features/communication.py")
    assert calls_in(files, lambda: step_with(off, 1.0, 1.0)) == {}
    assert calls_in(files, lambda: step_with(on, 1.0, 1.0))
    assert off.communication_summary() == {} and isinstance(torch.ones(1), torch.Tensor)
