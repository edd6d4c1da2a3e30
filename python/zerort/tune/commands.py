"""`zerort tune FILE -- COMMAND`: runs a program twice, as it is configured and as is proposed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from zerort.config import load_part
from zerort.errors import ConfigError
from zerort.terminal import Answer, Commands, Parser, add_command, positive
from zerort.tune.calls import TunedFile
from zerort.tune.feature import WARM_UP
from zerort.tune.findings import Findings, described, wire_line
from zerort.tune.model import Setting
from zerort.tune.task import Task

__all__ = ["add_tune_command"]

_SECTIONS = ("zero_optimization", "zerort")


def add_tune_command(commands: Commands) -> None:
    """Adds it to a command line."""
    parser = add_command(
        commands,
        "tune",
        _tune,
        help="bucket size, window and wire for a training program, predicted and then measured",
        example="zerort tune train.json -- torchrun --nproc-per-node 2 train.py",
    )
    parser.add_argument("file", metavar="FILE", help="the configuration that the program uses")
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="what starts the training; it is run twice, and ends by itself behind the steps",
    )
    parser.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="steps that are observed (20)"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where the changed file goes (FILE.tuned.json)"
    )
    parser.add_argument("--overwrite", action="store_true", help="also where there is one")
    parser.set_defaults(run=partial(_with_options, parser))


def _with_options(parser: Parser, args: argparse.Namespace) -> Answer:
    """argparse takes all behind FILE for the program's, options before the `--` too."""
    words = args.program
    if "--" in words:
        at = words.index("--")
        args = parser.parse_args([*words[:at], args.file], namespace=args)
        args.program = words[at + 1 :]
    return _tune(args)


def _tune(args: argparse.Namespace) -> Answer:
    command = args.program
    if not command:
        raise ConfigError(
            "zerort tune: expected the command that trains, as in `zerort tune train.json -- "
            "python train.py`"
        )
    file = TunedFile(args.file, args.output, overwrites=args.overwrite)
    stage = load_part(args.file, _SECTIONS).zero_optimization.stage
    with tempfile.TemporaryDirectory(prefix="zerort-tune-") as folder:
        path = str(Path(folder) / "findings.json")
        found = _run(Task(path, args.steps), command, as_json=args.json)
        tried = None
        if found.changes:
            task = Task(path, args.steps, found.proposed)
            tried = _run(task, command, as_json=args.json)
    wins = tried is not None and tried.measured < found.measured
    if wins:
        file.write(found.proposed)
    return _answer(found, tried, file if wins else None, stage)


def _run(task: Task, command: Sequence[str], *, as_json: bool) -> Findings:
    """Raises `ConfigError` where the program has measured nothing, `SystemExit` with its status
    where it has failed.
    """
    Path(task.findings).unlink(missing_ok=True)
    try:
        # the answer alone is on stdout where it is read by a program
        shown = sys.stderr if as_json else None
        ended = subprocess.run(command, env=task.environment(), stdout=shown, check=False)
    except OSError as error:
        raise ConfigError(f"zerort tune: {command[0]} cannot be run: {error.strerror}") from error
    found = _read(task.findings)
    if found.get("state") == "measured" and not ended.returncode:
        return _findings(found)
    if ended.returncode:
        status = ended.returncode if ended.returncode > 0 else 128 - ended.returncode
        print(f"zerort: the command ended with status {status}", file=sys.stderr)
        raise SystemExit(status)
    if not found:
        raise ConfigError(
            "zerort tune: the command ended and has never made an engine that trains: it has to "
            "call zerort.initialize with an optimizer, in a process that inherits the environment"
        )
    raise ConfigError(
        f"zerort tune: the command ended after {found['steps']} steps, and "
        f"{WARM_UP + task.steps + 1} are needed: give it more data, or fewer --steps"
    )


def _read(path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _findings(found: Mapping[str, Any]) -> Findings:
    fields = {key: value for key, value in found.items() if key != "state"}
    return Findings.of(fields)


def _answer(found: Findings, tried: Findings | None, file: TunedFile | None, stage: int) -> Answer:
    rows = [("present", found.present, found.predicted, found.measured)]
    if tried is not None:
        rows.append(("proposed", found.proposed, found.proposed_predicted, tried.measured))
    document = {
        "stage": stage,
        "wire": found.wire,
        "steps": found.steps,
        "settings": [
            {"name": name, **_plain(setting), "predicted": predicted, "measured": measured}
            for name, setting, predicted, measured in rows
        ],
        "written": None if file is None else str(file.path),
    }

    def show(console: Any) -> None:
        table = Table("", "setting", "predicted, ms", "measured, ms", box=None)
        for name, setting, predicted, measured in rows:
            times = (f"{1000 * seconds:.1f}" for seconds in (predicted, measured))
            table.add_row(name, Text(described(setting)), *times)
        console.print(wire_line(found.wire), markup=False, highlight=False)
        console.print(table)
        console.print(_verdict(found, tried, file), markup=False, highlight=False)

    return Answer(document, show)


def _plain(setting: Setting) -> dict[str, Any]:
    return {
        "bucket_bytes": setting.bucket_bytes,
        "window": setting.window or "all",
        "wire": setting.wire,
    }


def _verdict(found: Findings, tried: Findings | None, file: TunedFile | None) -> str:
    if tried is None:
        return "No other setting is predicted to be faster; nothing is written."
    if file is None:
        return "Measured, the proposal is not faster; nothing is written."
    text = (
        f"Wrote {file.path}: measured, a step is {1 - tried.measured / found.measured:.0%} shorter."
    )
    if found.proposed.wire is not None:
        text += f" Gradients are rounded to {found.proposed.wire} on their way."
    if file.loses_comments:
        text += " Comments of the file are not in it."
    return text
