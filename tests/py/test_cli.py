"""The command line, and the figures it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from fake_device import FakeDevice, FakeEvent
from zerort.cli import main
from zerort.trace import BucketLife, ChromeSink
from zerort.trace.reader import Step, TraceError, lives, read, steps
from zerort.trace.summary import account, wait_table


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def record(path, *, rank=0, count=2, capacity=1000):
    """`count` steps of 100 ms whose parts are known; rank r waits r ms longer. Returns the path as
    text.
    """
    sink, device = ChromeSink(path, rank, capacity), FakeDevice()
    sink.on_device(device.record)
    for number in range(count):
        began = device.at_ms
        with sink.range("forward"):
            device.at_ms += 20
        with sink.range("backward"):
            device.at_ms += 40
            wait(sink, device, 5 + rank)
            device.at_ms = began + 70
        moments = BucketLife(*(FakeEvent(device, began + offset) for offset in (22, 30, 42, 65)))
        sink.life(
            1,
            moments,
            bytes=4096,
            dtype="f32",
            params=2,
            last="experts[0].w",
            waited_for="bucket 0",
        )
        with sink.range("optimizer"):
            device.at_ms += 10
        with sink.range("publish"):
            device.at_ms += 4
            wait(sink, device, 4)
            device.at_ms += 2
        device.at_ms = began + 100
        sink.step(number + 1)
    with sink.range("forward"):  # of a step that never ends
        device.at_ms += 20
    sink.close()
    return str(path)


def wait(sink, device, ms):
    start = sink.mark()
    device.at_ms += ms
    sink.wait(start, sink.mark())


def test_the_parts_of_a_step_do_not_overlap_and_add_up(tmp_path):
    first, second = steps(read(record(tmp_path / "trace.json")).events)
    for step, number in ((first, 1), (second, 2)):
        assert step.number == number
        assert step.wall == pytest.approx(100, abs=0.001)
        assert step.exposed == pytest.approx(9, abs=0.001)
        assert step.parts == pytest.approx(
            {"forward": 20, "backward": 45, "optimizer": 10, "publish": 6}, abs=0.001
        )
        assert step.other == pytest.approx(10, abs=0.001)


def test_a_life_has_its_three_phases(tmp_path):
    life, _ = lives(read(record(tmp_path / "trace.json")).events)
    assert life.bucket == 1
    assert (life.filling, life.queued, life.in_flight) == pytest.approx((8, 12, 23), abs=0.001)
    assert life.args["dtype"] == "f32"


@pytest.mark.parametrize("capacity", [17, 22, 25, 28])
def test_a_step_that_the_ring_has_partly_forgotten_is_left_out(tmp_path, capacity):
    recorded = read(record(tmp_path / "trace.json", count=4, capacity=capacity))
    (step,) = steps(recorded.events, dropped=recorded.dropped)
    assert (step.number, step.exposed) == (4, pytest.approx(9, abs=0.001))


def test_the_account_of_a_step_is_four_lines(tmp_path):
    summed = account(read(record(tmp_path / "trace.json")).events)
    assert str(summed).splitlines() == [
        "compute                   65.00 ms  65.0%",
        "exposed communication      9.00 ms   9.0%",
        "optimizer                 10.00 ms  10.0%",
        "publish                    6.00 ms   6.0%",
    ]


def test_an_account_without_a_step_says_so(tmp_path):
    sink = ChromeSink(tmp_path / "trace.json", 0, 10)
    sink.close()
    with pytest.raises(TraceError, match="no whole step"):
        account(read(sink.path).events)


def test_the_summary_tells_what_steps_waited_for_gathers_apart_from_sums(capsys):
    waits = [("all_gather of unit 3 (a .. b)", 4.0), ("all_gather of unit 12 (c)", 2.0)]
    found = [
        Step(1, 100.0, 9.0, waits=[*waits, ("reduce_scatter of bucket 0 (a)", 3.0)]),
        Step(2, 100.0, 1.0, waits=[("roll call", 1.0)]),
    ]
    Console(width=100).print(wait_table(found))
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["all_gather of unit", "1.0", "3.00", "60.0%"],
        ["reduce_scatter of bucket", "0.5", "1.50", "30.0%"],
        ["roll call", "0.5", "0.50", "10.0%"],
    ]


def test_the_summary_shows_buckets_steps_and_the_exposed_share_of_all_ranks(tmp_path, capsys):
    files = [record(tmp_path / f"{rank}.json", rank=rank) for rank in (1, 0)]
    assert main(["trace", "summary", *files]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "1",
        "4",
        "4,096",
        "8.00",
        "12.00",
        "23.00",
        "experts[0].w",
        "(4x)",
        "bucket",
        "0",
        "(4x)",
    ] in shown
    steps_shown = [row for row in shown if len(row) == 10 and row[0] in "01"]
    assert [row[:2] for row in steps_shown] == [
        [rank, step] for rank in "01" for step in ("1", "2", "median")
    ]
    assert steps_shown[2] == [
        "0",
        "median",
        "20.00",
        "45.00",
        "9.00",
        "10.00",
        "6.00",
        "10.00",
        "100.00",
        "9.0%",
    ]
    assert [
        "exposed",
        "communication:",
        "9.5%",
        "of",
        "the",
        "time",
        "(steps:",
        "4,",
        "ranks:",
        "2)",
    ] in shown


def test_the_number_of_steps_shown_can_be_chosen(tmp_path, capsys):
    assert main(["trace", "summary", "--steps", "1", record(tmp_path / "trace.json", count=5)]) == 0
    shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["0", "5"] in shown
    assert ["0", "4"] not in shown


def test_what_the_ring_forgot_is_said(tmp_path, capsys):
    assert main(["trace", "summary", record(tmp_path / "trace.json", count=9, capacity=30)]) == 0
    assert "older events were forgotten; raise zerort.trace.capacity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"traceEvents":[{"name":', "not complete JSON"),
        (b"\xff\xfe", "not complete JSON"),
        (b"[]", "not a trace that zerort wrote"),
        (b'{"traceEvents":[]}', "not a trace that zerort wrote (KeyError: 'otherData')"),
        (
            b'{"otherData":{"rank":0,"dropped":0},"traceEvents":[{"ph":"X"}]}',
            "lacks a field of its phase",
        ),
        (
            b'{"otherData":{"rank":0,"dropped":0},"traceEvents":[{"ph":"Z"}]}',
            "not a trace that zerort wrote",
        ),
        (
            b'{"otherData":{"rank":0,"dropped":0},"traceEvents":"none"}',
            "not a trace that zerort wrote",
        ),
    ],
)
def test_a_file_that_is_no_trace_is_named_with_the_reason(tmp_path, capsys, content, complaint):
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    assert main(["trace", "summary", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"zerort: {path}: ")
    assert complaint in error
    assert len(error.splitlines()) == 1


def test_a_truncated_trace_is_named_wherever_it_was_cut(tmp_path, capsys):
    whole = Path(record(tmp_path / "trace.json")).read_text().rstrip()
    cut = tmp_path / "cut.json"
    for length in range(0, len(whole), 97):
        cut.write_text(whole[:length])
        assert main(["trace", "summary", str(cut)]) == 2
        assert "cut.json: not complete JSON" in capsys.readouterr().err


def test_a_missing_file_and_two_files_of_one_rank_are_named(tmp_path, capsys):
    path = record(tmp_path / "trace.json")
    assert main(["trace", "summary", str(tmp_path / "missing.json")]) == 2
    assert "missing.json: cannot be read: No such file" in capsys.readouterr().err
    assert main(["trace", "summary", path, path]) == 2
    assert "rank 0 is in two of the files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [[], ["trace"], ["trace", "summary"], ["trace", "summary", "--steps", "-1", "f"], ["no"]],
)
def test_a_command_line_with_a_mistake_is_status_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 2
    assert "usage: zerort" in capsys.readouterr().err


def test_config_shows_what_each_key_does(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train_batch_size": 8}))
    assert main(["config", str(path)]) == 0
    assert "train_batch_size" in capsys.readouterr().out


def test_config_ends_with_status_1_when_there_is_a_mistake_in_the_file(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train_batch_sise": 8}))
    assert main(["config", str(path)]) == 1
    assert "train_batch_sise" in capsys.readouterr().out
    assert main(["config", str(tmp_path / "missing.json")]) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err
