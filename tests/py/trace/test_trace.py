"""The trace of one rank, from the calls of an engine to a file that a viewer opens."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chrome_format import check, check_file
from fake_device import FakeDevice, FakeEvent, LostEvent
from zerort import _core
from zerort.errors import ConfigError
from zerort.trace import (
    SINKS,
    BucketLife,
    ChromeSink,
    NullSink,
    ProfilerSink,
    TraceSink,
    open_sink,
    saver,
)

MS = 1_000_000


@pytest.fixture
def sink(tmp_path):
    opened = ChromeSink(tmp_path / "trace.json", 2, 1000)
    yield opened
    opened.close()


def written(sink):
    sink.flush()
    return check_file(sink.path)


def named(events, name):
    return [event for event in events if event["name"] == name]


def one_step(sink, number=0):
    """The calls of an engine with two buckets."""
    with sink.range("forward"):
        at = sink.now()
    with sink.range("backward"):
        for bucket in (1, 0):
            sink.counter("bytes in flight", sink.now(), 4096 * (2 - bucket))
            start = sink.mark()
            sink.span("collectives", f"reduce-scatter b{bucket}", start, sink.mark(), bytes=4096)
            sink.wait(start, sink.mark(), bucket=bucket)
            moments = BucketLife(at, at + MS, start, sink.mark(), sink.mark())
            sink.life(
                bucket, moments, bytes=4096, dtype="f32", params=3, last=f"layers.{bucket}.weight"
            )
    with sink.range("optimizer"):
        pass
    sink.step(number)


def test_a_step_becomes_a_file_in_chromes_format(sink):
    one_step(sink)
    events = written(sink)
    assert {event["pid"] for event in events} == {2}
    assert named(events, "process_name")[0]["args"] == {"name": "rank 2"}
    rows = [event["args"]["name"] for event in named(events, "thread_name")]
    assert rows == ["main", "buckets", "collectives"]
    for name in (
        "forward",
        "backward",
        "optimizer",
        "wait",
        "reduce-scatter b1",
        "bytes in flight",
        "step",
    ):
        assert named(events, name), name


def test_a_buckets_life_shows_its_phases_and_what_is_known_of_it(sink):
    moments = BucketLife(1 * MS, full=3 * MS, launched=7 * MS, landed=13 * MS, retired=15 * MS)
    sink.life(5, moments, bytes=64, dtype="bf16", params=2, last="head.weight", alone_ms=1.5)
    events = [event for event in written(sink) if event.get("cat") == "buckets"]
    begun = {event["name"]: event["ts"] for event in events if event["ph"] == "b"}
    lasted = {
        event["name"]: event["ts"] - begun[event["name"]] for event in events if event["ph"] == "e"
    }
    assert lasted == pytest.approx(
        {"bucket 5": 14e3, "filling": 2e3, "queued": 4e3, "in flight": 6e3, "summing": 2e3},
        abs=0.05,
    )
    assert events[0]["args"] == {
        "bucket": 5,
        "bytes": 64,
        "dtype": "bf16",
        "params": 2,
        "last": "head.weight",
        "alone_ms": 1.5,
    }


def test_lives_that_overlap_are_told_apart(sink):
    for bucket, first in ((0, 0), (1, 2), (0, 4)):
        sink.life(bucket, BucketLife(*(first * MS + phase * MS for phase in (1, 2, 3, 8, 9))))
    lives = [
        event
        for event in written(sink)
        if event["name"].startswith("bucket ") and event["ph"] == "b"
    ]
    assert len({event["id"] for event in lives}) == 3


@given(moments=st.lists(st.integers(0, 10), min_size=5, max_size=5), capacity=st.integers(1, 12))
def test_any_moments_and_any_capacity_make_a_valid_file(tmp_path_factory, moments, capacity):
    sink = ChromeSink(tmp_path_factory.mktemp("trace") / "trace.json", 0, capacity)
    try:
        for bucket in range(3):
            sink.life(bucket, BucketLife(*moments))
            sink.wait(moments[0], moments[1])
            sink.step(bucket)
        written(sink)
    finally:
        sink.close()


def test_exposed_communication_counts_the_waits_of_a_step_and_starts_anew(sink):
    start = sink.now()
    sink.wait(start - 8 * MS, start - 6 * MS)
    sink.wait(start - 5 * MS, start - 4 * MS)
    sink.step(0)
    sink.wait(start + 90 * MS, start + 94 * MS)
    values = [event["args"]["value"] for event in named(written(sink), "exposed communication")]
    assert values == [2.0, 3.0, 0.0, 4.0]


def test_the_axis_is_the_calendar_so_that_ranks_line_up(tmp_path):
    sinks = [ChromeSink(tmp_path / f"{rank}.json", rank, 10) for rank in range(2)]
    for sink in sinks:
        sink.step(0)
    calendar_us = (time.time_ns() - 1_735_689_600 * 10**9) / 1000
    first, second = (named(written(sink), "step")[0]["ts"] for sink in sinks)
    for sink in sinks:
        sink.close()
    assert abs(first - second) < 50_000
    assert abs(second - calendar_us) < 1_000_000
    assert first < second, "events of one host are in their order, whatever rank saw them"


def test_an_exception_in_a_range_still_records_it(sink):
    with pytest.raises(ValueError, match="loss"), sink.range("backward"):
        raise ValueError("loss")
    assert len(named(written(sink), "backward")) == 1


def test_what_comes_after_the_last_flush_is_dropped(sink):
    sink.step(0)
    sink.close()
    sink.close()
    sink.step(1)
    sink.flush()
    assert len(named(check_file(sink.path), "step")) == 1


def test_device_times_are_resolved_after_the_device_passed_them(sink):
    device = FakeDevice()
    sink.on_device(device.record)
    with sink.range("forward"):
        device.at_ms += 20
    start = sink.mark()
    device.at_ms += 5
    sink.wait(start, sink.mark())
    sink.step(0)
    assert len(sink._ring) == 0, "the device has passed nothing yet"
    device.passed_ms = 1020
    sink.step(1)
    assert len(sink._ring) == 1, "the forward pass is over, the wait is not"
    events = written(sink)
    assert device.passed_ms == 1025, "a flush waits for the rest"
    assert named(events, "forward")[0]["dur"] == pytest.approx(20e3, abs=0.1)
    assert named(events, "wait")[0]["dur"] == pytest.approx(5e3, abs=0.1)
    assert named(events, "wait")[0]["ts"] == pytest.approx(
        named(events, "forward")[0]["ts"] + 20e3, abs=0.1
    )


def test_device_times_stay_exact_over_hours(sink):
    device = FakeDevice()
    sink.on_device(device.record)
    for number in range(8):
        sink.step(number)
        device.at_ms += 1_800_000.125
        device.passed_ms = device.at_ms
    steps = [event["ts"] for event in named(written(sink), "step")]
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert gaps == pytest.approx([1_800_000_125.0] * 7, abs=1.0)


def test_host_and_device_moments_share_one_axis(sink):
    device = FakeDevice()
    before = sink.now()
    sink.on_device(device.record)
    after = sink.now()
    sink.counter("bytes in flight", before, 1)
    sink.step(0)
    sink.counter("bytes in flight", after, 2)
    order = [
        event["name"]
        for event in written(sink)
        if event["ph"] in "Ci" and event["name"] != "exposed communication"
    ]
    assert order == ["bytes in flight", "step", "bytes in flight"]


def test_a_lost_device_costs_its_times_and_not_the_file(sink):
    device = FakeDevice()
    sink.step(7)
    sink.on_device(device.record)
    sink.span("collectives", "reduce-scatter", LostEvent(device, 0.0), LostEvent(device, 1.0))
    sink.step(8)
    with pytest.warns(RuntimeWarning, match="device's times are lost: device-side assert"):
        sink.flush()
    assert [event["args"]["step"] for event in named(check_file(sink.path), "step")] == [7]


def test_a_file_that_can_no_longer_be_written_is_a_warning(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    sink = ChromeSink(folder / "trace.json", 0, 10)
    (folder / "trace.json").unlink()
    folder.rmdir()
    with pytest.warns(RuntimeWarning, match=r"gone/trace\.json: not written"):
        sink.close()


@pytest.mark.parametrize(
    ("template", "world", "name"),
    [
        ("trace.json", 1, "trace.json"),
        ("trace.json", 2, "trace-rank1.json"),
        ("run.{rank}.json", 2, "run.1.json"),
        ("run.{rank}.json", 1, "run.1.json"),
        ("trace", 2, "trace-rank1"),
    ],
)
def test_each_rank_has_a_file_of_its_own(tmp_path, monkeypatch, template, world, name):
    monkeypatch.delenv("ZERORT_TRACE", raising=False)
    sink = open_sink(str(tmp_path / template), rank=1, world=world)
    sink.close()
    assert sink.path == tmp_path / name
    check_file(tmp_path / name)


def test_the_environment_overrides_the_configured_path(tmp_path, monkeypatch):
    monkeypatch.setenv("ZERORT_TRACE", str(tmp_path / "env.json"))
    sink = open_sink(str(tmp_path / "config.json"), rank=0, world=1)
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["env.json"]


@pytest.mark.parametrize(
    ("path", "world", "complaint"),
    [
        ("missing/trace.json", 1, r"'missing/trace\.json': No such file"),
        ("missing/trace.json", 2, r"'missing/trace-rank0\.json': No such file"),
        (".", 1, r"'\.': it exists and is not a regular file"),
        (".", 2, r"'\.': it exists and is not a regular file"),
        ("/dev/null", 1, "'/dev/null': it exists and is not a regular file"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_at_once_and_named(
    tmp_path, monkeypatch, path, world, complaint
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZERORT_TRACE", raising=False)
    with pytest.raises(ConfigError, match=complaint):
        open_sink(path, rank=0, world=world)
    assert Path("/dev/null").is_char_device()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["raise RuntimeError('mid-step')", "raise KeyboardInterrupt", ""])
def test_the_file_is_complete_however_the_program_ends(tmp_path, end):
    path = tmp_path / "trace.json"
    program = f"""
import sys
from zerort.trace import open_sink
sink = open_sink({str(path)!r}, rank=0, world=1)
with sink.range("forward"):
    pass
sink.step(0)
with sink.range("backward"):
    {end or "pass"}
"""
    environment = {**os.environ, "ZERORT_TRACE": ""}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (ran.returncode == 0) == (end == ""), ran.stderr
    assert named(check_file(path), "backward"), ran.stderr


def test_a_killed_program_leaves_the_last_flush(tmp_path):
    path = tmp_path / "trace.json"
    program = f"""
import os, signal
from zerort.trace import open_sink
sink = open_sink({str(path)!r}, rank=0, world=1)
sink.step(0)
sink.flush()
sink.step(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "ZERORT_TRACE": ""}, check=False
    )
    assert len(named(check_file(path), "step")) == 1


def test_a_killed_program_leaves_what_was_written_beside_it(tmp_path):
    path = tmp_path / "trace.json"
    program = f"""
import os, signal, time
from zerort.trace import open_sink, saver
saver.EVERY = 0.0
sink = open_sink({str(path)!r}, rank=0, world=1)
for number in range(10_000):
    sink.step(number)
    time.sleep(0.001)
    if '"step"' in open({str(path)!r}).read():
        break
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "ZERORT_TRACE": ""}, check=False
    )
    assert named(check_file(path), "step")


def test_what_is_written_beside_a_run_never_takes_the_place_of_what_is_newer(sink, monkeypatch):
    monkeypatch.setattr(saver, "EVERY", 0.0)
    monkeypatch.setattr(saver, "_SHARE", 0.0)
    sink._saver._due = 0.0
    for number in range(200):
        sink.step(number)
    sink.close()
    events = check_file(sink.path)
    assert len(named(events, "step")) == 200
    assert named(events, "written"), "each write is a span of the trace itself"


def test_writing_beside_a_run_takes_a_fiftieth_of_its_time_at_most(monkeypatch):
    monkeypatch.setattr(saver, "EVERY", 0.0)
    written, taken = [], []

    class Slow:
        def write(self, path: str) -> None:
            time.sleep(0.02)
            written.append(path)

    one = saver.Saver("trace.json", lambda begun, ended: None)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        one.look(lambda: taken.append(0) or Slow())
    one.join()
    assert (len(taken), written) == (1, ["trace.json"]), "the next is due a second later"


def test_a_forked_child_leaves_its_parents_file_alone(sink):
    sink.step(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's threads
        child = os.fork()
    if child == 0:
        sink.step(1)
        sink.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert named(check_file(sink.path), "step") == []


def every_sink(tmp_path):
    for name, make in SINKS.items():
        for wrapped in (False, True):
            inner = make(tmp_path / f"{name}-{wrapped}.json", 0, 100)
            yield ProfilerSink(inner) if wrapped else inner


def test_every_sink_of_the_table_takes_every_call(tmp_path):
    for sink in every_sink(tmp_path):
        one_step(sink)
        sink.flush()
        sink.close()
        assert isinstance(sink.now(), int)
        assert (sink.path is not None) == sink.enabled


def test_every_sink_has_the_protocols_signatures(tmp_path):
    calls = [
        name
        for name, member in vars(TraceSink).items()
        if inspect.isfunction(member) and name[0] != "_"
    ]
    assert "life" in calls
    for sink in every_sink(tmp_path):
        for name in set(calls) - {"now", "mark"}:  # these may be the clock itself
            wanted = list(inspect.signature(getattr(TraceSink, name)).parameters)[1:]
            assert list(inspect.signature(getattr(sink, name)).parameters) == wanted, (sink, name)
        sink.close()


def test_without_a_trace_nothing_is_kept_or_allocated(monkeypatch):
    monkeypatch.delenv("ZERORT_TRACE", raising=False)
    sink = open_sink(None, rank=0, world=1)
    assert not sink.enabled
    assert sink.path is None
    assert sink.range("forward") is sink.range("backward")


@pytest.mark.parametrize("traced", [False, True])
def test_torchs_profiler_shows_the_same_names(tmp_path, traced):
    sink = ProfilerSink(ChromeSink(tmp_path / "trace.json", 0, 10) if traced else NullSink())
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        sink.range("forward"),
    ):
        torch.ones(1) + 1
    assert "forward" in {event.key for event in profile.key_averages()}
    if traced:
        assert named(written(sink), "forward")
    sink.close()


def test_the_core_refuses_what_it_cannot_keep(tmp_path):
    with pytest.raises(ValueError, match="capacity: expected at least 1"):
        _core.Trace(0, 0)
    trace = _core.Trace(0, 3)
    with pytest.raises(ValueError, match="track 0: not one that `track` gave"):
        trace.span(0, "forward", 0, 1)
    row = trace.track("main")
    with pytest.raises(TypeError):
        trace.instant(row, "step", 0, {"number": None})
    with pytest.raises(FileNotFoundError):
        trace.write(str(tmp_path / "missing" / "trace.json"))
    assert len(trace) == 0


def test_the_core_counts_what_the_ring_forgot_and_shows_every_kind_of_argument(tmp_path):
    trace = _core.Trace(0, 2)
    row = trace.track("main")
    for at in range(5):
        trace.instant(
            row, "step", at, {"at": at, "huge": 1 << 80, "norm": float("nan"), "name": 'a\u2028"b'}
        )
    assert (len(trace), trace.dropped) == (2, 3)
    trace.write(str(tmp_path / "trace.json"))
    shown = [event["args"] for event in named(check_file(tmp_path / "trace.json"), "step")]
    assert shown == [
        {"at": at, "huge": float(1 << 80), "norm": "NaN", "name": 'a\u2028"b'} for at in (3, 4)
    ]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "trace.json"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        _core.Trace(0, 1).write(str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"name": "x", "ph": "X", "pid": 0, "tid": 1, "ts": 1.0}, "dur of"),
        ({"name": "x", "ph": "X", "pid": "0", "tid": 1, "ts": 1.0, "dur": 0}, "pid of"),
        ({"name": "x", "ph": "Q", "pid": 0, "tid": 1}, "unknown phase"),
        (
            {"name": "x", "ph": "e", "pid": 0, "tid": 1, "ts": 1.0, "cat": "c", "id": "0x1"},
            "an end without its begin",
        ),
        (
            {"name": "x", "ph": "b", "pid": 0, "tid": 1, "ts": 1.0, "cat": "c", "id": "0x1"},
            "begins without an end",
        ),
        ({"name": "x", "ph": "i", "pid": 0, "tid": 9, "ts": 1.0, "s": "t"}, "rows without a name"),
    ],
)
def test_the_checker_finds_what_is_wrong(tmp_path, wrong, complaint):
    trace = _core.Trace(0, 1)
    trace.track("main")
    trace.write(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    check(events)
    with pytest.raises(AssertionError, match=complaint):
        check([*events, wrong])


class Yielding(deque):
    """A queue whose readers let other threads run at each look."""

    def __getitem__(self, index):
        value = super().__getitem__(index)
        time.sleep(1e-5)
        return value

    def popleft(self):
        time.sleep(1e-5)
        return super().popleft()


def test_spans_of_several_threads_are_all_kept(sink):
    threads, each = 3, 200
    sink._pending = Yielding()
    errors = []

    def work(thread):
        try:
            for index in range(each):
                sink.span(f"thread {thread}", f"{thread}.{index}", 0, 1)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    names = [event["name"] for event in written(sink) if event["ph"] == "X"]
    assert errors == []
    assert sorted(names) == sorted(f"{t}.{i}" for t in range(threads) for i in range(each))


def test_a_signals_handler_may_record_while_a_span_is_being_written(sink):
    class Interrupting(FakeEvent):
        """An event in whose query a handler runs, on the same thread."""

        def query(self):
            if not done:
                done.append(True)
                sink.span("handler", "from the handler", 0, 1)
                sink.flush()
            return super().query()

    done = []
    device = FakeDevice()
    sink.on_device(device.record)
    sink.span("main", "interrupted", Interrupting(device, 1000.0), FakeEvent(device, 1000.0))
    sink.step(0)
    names = [event["name"] for event in written(sink) if event["ph"] == "X"]
    assert sorted(names) == ["from the handler", "interrupted"]
