"""The command line, and the figures it prints."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import zerort
from fake_device import FakeDevice, FakeEvent
from zerort.cli import main, parser
from zerort.errors import ConfigError
from zerort.memory import Kind
from zerort.terminal import Answer, Parser, as_command, execute, shown, track
from zerort.trace import BucketLife, ChromeSink
from zerort.trace.reader import Step, TraceError, lives, read, steps
from zerort.trace.summary import account, wait_table

RECORDED = Path(__file__).parent.parent / "data" / "deepspeed" / "0.19.8"


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
        moments = BucketLife(
            *(FakeEvent(device, began + offset) for offset in (22, 30, 42, 60, 65))
        )
        sink.life(
            1,
            moments,
            bytes=4096,
            dtype="f32",
            params=2,
            last="experts[0].w",
            alone_ms=3.0,
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
    assert life.phases == pytest.approx((8, 12, 18, 5), abs=0.001)
    assert life.args["dtype"] == "f32"


@pytest.mark.parametrize("capacity", [18, 23, 26, 30])
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
        "18.00",
        "5.00",
        "experts[0].w",
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
        (b'{"traceEvents":[{"name":', "no JSON, so not a trace"),
        (b"\xff\xfe", "no JSON, so not a trace"),
        (b"", "no JSON, so not a trace"),
        (b'{"displayTimeUnit":"ms","otherData":{"format":1,"ra', "cut off before its first event"),
        (
            b'{"otherData":{"rank":0,"dropped":0},"traceEvents":[]}',
            "a trace of format 0, where this version of zerort reads 1",
        ),
        (
            b'{"otherData":{"format":2,"rank":0,"dropped":0},"traceEvents":[]}',
            "a trace of format 2, where this version of zerort reads 1",
        ),
        (b"[]", "not a trace that zerort wrote"),
        (b'{"traceEvents":[]}', "not a trace that zerort wrote (KeyError: 'otherData')"),
        (
            b'{"otherData":{"format":1,"rank":0,"dropped":0},"traceEvents":[{"ph":"X"}]}',
            "lacks a field of its phase",
        ),
        (
            b'{"otherData":{"format":1,"rank":0,"dropped":0},"traceEvents":[{"ph":"Z"}]}',
            "not a trace that zerort wrote",
        ),
        (
            b'{"otherData":{"format":1,"rank":0,"dropped":0},"traceEvents":"none"}',
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


def test_of_a_trace_that_breaks_off_what_is_before_that_is_shown_and_the_break_is_said(
    tmp_path, capsys
):
    whole = Path(record(tmp_path / "trace.json")).read_text().rstrip()
    cut = tmp_path / "cut.json"
    head, count = whole.index("\n"), {2: 0, 1: 0, 0: 0}
    for length in range(0, len(whole), 97):
        cut.write_text(whole[:length])
        if length <= head:
            assert main(["trace", "summary", str(cut)]) == 2
            assert "cut.json: " in capsys.readouterr().err
            continue
        recorded = read(cut)
        assert recorded.cut
        found = steps(recorded.events)
        assert found == steps(read(tmp_path / "trace.json").events)[: len(found)]
        count[len(found)] += 1
        assert main(["trace", "summary", str(cut)]) == 1
        assert "rank 0: its file breaks off" in capsys.readouterr().out
    assert min(count.values()) > 0, "there are cuts after none, one and both steps"


def test_a_missing_file_and_two_files_of_one_rank_are_named(tmp_path, capsys):
    path = record(tmp_path / "trace.json")
    assert main(["trace", "summary", str(tmp_path / "missing.json")]) == 2
    assert "missing.json: cannot be read: No such file" in capsys.readouterr().err
    assert main(["trace", "summary", path, path]) == 2
    assert "rank 0 is in two of the files" in capsys.readouterr().err


def leaves(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command, by what one writes behind `zerort`."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield name, parser
    for action in inner:
        for word, below in action.choices.items():
            yield from leaves(below, f"{name} {word}".strip())


def a_config(folder: Path) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}}))
    return path


def two_checkpoints(folder: Path) -> Path:
    engine = zerort.initialize(model=nn.Linear(3, 2), config={"train_batch_size": 1})[0]
    engine.save_checkpoint(folder / "run", "one")
    with torch.no_grad():
        engine.module.bias += 1
    engine.save_checkpoint(folder / "run", "two")
    engine.destroy()
    return folder / "run"


Case = tuple[Callable[[Path], list[Any]], int, str]
COMMANDS: dict[str, Case | None] = {
    "config": (lambda at: [a_config(at), "--numel", "1M", "--world", "2"], 0, "forecasts"),
    "estimate": (lambda at: ["--params", "1M", "--layers", "2", "--ranks", "2"], 0, "forecasts"),
    "simulate": (
        lambda at: [
            *("--model", "models:mlp", "--flops", "1TFLOP/s", "--ranks", "2,4"),
            *("--wire", "alpha=20us,beta=1GB/s"),
        ],
        0,
        "points",
    ),
    "trace summary": (lambda at: [record(at / "trace.json")], 0, "ranks"),
    "trace report": (lambda at: [record(at / "a.json"), "-o", at / "report.html"], 0, "written"),
    "trace diff": (lambda at: [record(at / "a.json"), record(at / "b.json", count=3)], 0, "step"),
    "ckpt ls": (lambda at: [two_checkpoints(at)], 0, "checkpoints"),
    "ckpt show": (lambda at: [two_checkpoints(at), "one"], 0, "tensors"),
    "ckpt verify": (lambda at: [two_checkpoints(at)], 0, "checkpoints"),
    "ckpt diff": (
        lambda at: [(run := two_checkpoints(at)) / "one", run / "two"],
        1,
        "different",
    ),
    "ckpt import": (lambda at: [RECORDED / "2-fp32", at / "out"], 0, "notes"),
    "ckpt export": (
        lambda at: [two_checkpoints(at), at / "out", "--to=safetensors"],
        0,
        "path",
    ),
    "doctor": (lambda at: ["--quick"], 0, "findings"),
    "tune": None,
}
"""Of each command a line that works, made in a folder, the status, and a key of its document. None
where a test of the command's own runs it with `--json`.
"""
RUN = [name for name, case in COMMANDS.items() if case is not None]


def test_every_command_is_in_the_table() -> None:
    assert {name for name, _ in leaves(parser())} == COMMANDS.keys()


def test_every_command_is_in_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"**`zerort {name}" not in page] == []


def test_a_name_in_a_narrow_terminal_is_folded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["config", str(a_config(tmp_path))]) == 0
    rows = [line.split("│")[1:2] for line in capsys.readouterr().out.splitlines()]
    assert "".join(cell.strip() for row in rows for cell in row) == (
        "train_batch_sizezero_optimization.stage"
    )


@pytest.mark.parametrize("name", RUN)
def test_a_commands_answer_is_a_table_or_a_document(name, tmp_path, capsys):
    case = COMMANDS[name]
    assert case is not None
    for folder, flags in ((tmp_path / "a", []), (tmp_path / "b", ["--json"])):
        folder.mkdir()
        assert main([*name.split(), *map(str, case[0](folder)), *flags]) == case[1]
        out, err = capsys.readouterr()
        assert not err and out
        if flags:
            assert case[2] in json.loads(out, parse_constant=pytest.fail)
        else:
            with pytest.raises(ValueError):
                json.loads(out)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_parses(name, capsys):
    for width in ("30", "100"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setenv("COLUMNS", width)
            main([*name.split(), "--help"])
        assert stopped.value.code == 0
        *_, heading, line = capsys.readouterr().out.splitlines()
        assert heading == "example:"
        assert line.startswith(f"  zerort {name}")
        parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["trace"],
        ["trace", "summary"],
        ["trace", "summary", "--steps", "-1", "f"],
        ["trace", "summary", "--st", "1", "f"],
        ["no"],
        ["config", "f", "--world", "9" * 5000],
    ],
)
def test_a_command_line_with_a_mistake_is_one_line_and_status_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("zerort") and "--help" in err and len(err.splitlines()) == 1


def test_config_shows_what_each_key_does(tmp_path, capsys):
    assert main(["config", str(a_config(tmp_path))]) == 0
    assert "train_batch_size" in capsys.readouterr().out


def test_a_configuration_with_a_mistake_is_status_1_and_one_that_cannot_be_read_2(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train_batch_sise": 8}))
    assert main(["config", str(path)]) == 1
    assert "train_batch_sise" in capsys.readouterr().out
    assert main(["config", str(tmp_path / "missing.json")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


# How a command ends, whatever it is.


def command(run) -> Parser:
    return as_command(Parser(prog="zerort"), run)


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a: expected b"), 2, "zerort: a: expected b\n"),
        (FileNotFoundError(2, "No such file", "x\udcff"), 2, "zerort: x\\udcff: No such file\n"),
        (KeyboardInterrupt(), 130, "zerort: interrupted\n"),
        (KeyError("a mistake of ours"), 2, "Traceback"),
    ],
)
def test_a_command_that_raises_has_no_answer(error, status, said, capsys):
    assert execute(command(raising(error)), []) == status
    out, err = capsys.readouterr()
    assert said in err and not out


def test_a_document_is_strict_json(capsys):
    found = {
        "nan": math.nan,
        "far": -math.inf,
        "kind": Kind.STATE,
        "path": Path("a"),
        "name": "\ud800[red]",
        "rows": (each for each in [Answer(1, print)][:0]),
        3: True,
    }
    assert execute(command(lambda args: Answer(found, print, 1)), ["--json"]) == 1
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "nan": None,
        "far": None,
        "kind": Kind.STATE.value,
        "path": "a",
        "name": "\ud800[red]",
        "rows": [],
        "3": True,
    }
    assert execute(command(lambda args: Answer({1j}, print)), ["--json"]) == 2
    assert "a complex in a document" in capsys.readouterr().err


def test_a_text_is_shown_as_it_is_and_a_bar_only_on_a_terminal(capsys):
    def run(args):
        return Answer(list(track([1, 2], "counting")), shown("[red]\ud800" + "x" * 200))

    assert execute(command(run), []) == 0
    assert capsys.readouterr() == ("[red]\\ud800" + "x" * 200 + "\n", "")


ENDING = """
import sys
from zerort.terminal import Answer, Parser, as_command, execute, progress, shown
from rich.table import Table

def run(args):
    with progress("waiting", 2) as advance:
        advance(1)
    if sys.argv[1] == "slow":
        print("ready", file=sys.stderr, flush=True)
        import time
        time.sleep(60)
    table = Table("wide")
    for _ in range(3000):
        table.add_row("x")
    return Answer(list(range(3000)), shown("[bold]\u2026", table), 1)

sys.exit(execute(as_command(Parser(), run), sys.argv[2:]))
"""


def start(*argv: str, stdout: int = subprocess.PIPE, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", ENDING, *argv],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | env,
    )


def test_a_reader_that_stops_reading_is_no_error():
    with start("fast", PYTHONIOENCODING="ascii") as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.read(5) == b"[bold"
        child.stdout.close()
        assert (child.wait(30), child.stderr.read()) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line_and_status_2():
    with open("/dev/full", "wb") as full, start("fast", "--json", stdout=full.fileno()) as child:
        assert child.stderr is not None
        said = child.stderr.read().decode()
        assert child.wait(30) == 2
    assert said == "zerort: [Errno 28] No space left on device\n"


def test_ctrl_c_is_status_130_without_a_traceback():
    with start("slow") as child:
        assert child.stderr is not None
        assert child.stderr.readline() == b"ready\n"
        child.send_signal(signal.SIGINT)
        assert (child.wait(30), child.stderr.read()) == (130, b"zerort: interrupted\n")
