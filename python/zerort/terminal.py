"""What every command of `zerort` has: how it is declared, what it answers, and how it ends.

A command is a function from its arguments to an `Answer`, a document and a way to show it to a
person. It prints nothing itself, so `--json` means the same everywhere: the document on stdout, as
strict JSON, and nothing else there. Progress is on stderr, where that is a terminal.

The exit status is as of grep and diff:

- 0: here is the answer;
- 1: here is the answer, and what was looked into is not as it should be: a damaged checkpoint, a
  configuration with mistakes, weights that differ;
- 2: there is no answer. The reason is one line on stderr: an argument or a file that cannot be
  used, or a disk that is full;
- 130 after Ctrl-C, and 141 where whoever read stdout has gone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from io import TextIOWrapper
from pathlib import PurePath
from typing import Any, NoReturn, TypeAlias, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zerort.errors import ZerortError

__all__ = [
    "FOUND",
    "Answer",
    "Commands",
    "Parser",
    "add_command",
    "add_group",
    "as_command",
    "count",
    "elements",
    "execute",
    "grid",
    "plain",
    "positive",
    "progress",
    "ranks",
    "shown",
    "track",
]

FOUND, UNUSABLE, INTERRUPTED, UNREAD = 1, 2, 130, 141

T = TypeVar("T")

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Answer:
    """What a command has found or done."""

    document: Any
    """Mappings, sequences, dataclasses, strings and numbers; what is not finite becomes null."""
    show: Callable[[Console], None]
    """Prints it for a person."""
    status: int = 0
    """0, or 1 where something is not as it should be."""
    speaks: bool = True
    """False on a rank that leaves it to another to say."""


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """An example stays a line that can be copied."""
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """One whose mistakes are one line, and whose options cannot be abbreviated: what is short for
    one today would be short for two tomorrow.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(UNUSABLE, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], Answer],
    *,
    help: str,
    example: str,
) -> Parser:
    """Declares a command; its arguments are added to what is returned.

    `example` is a command line that works, and the last line of the command's help.
    """
    parser = commands.add_parser(
        name, help=help, description=_sentence(help), epilog=f"example:\n  {example}"
    )
    return as_command(parser, run)


def as_command(parser: Parser, run: Callable[[argparse.Namespace], Answer]) -> Parser:
    """Makes a whole parser one command."""
    parser.add_argument(
        "--json", action="store_true", help="print the answer as one JSON document, and no table"
    )
    parser.set_defaults(run=run)
    return parser


def add_group(commands: Commands, name: str, *, help: str) -> Commands:
    """Declares commands under one name."""
    parser = commands.add_parser(
        name,
        help=help,
        description=_sentence(help),
        epilog=f"`zerort {name} COMMAND --help` ends with an example.",
    )
    return parser.add_subparsers(required=True, metavar="COMMAND")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def execute(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status. Raises `SystemExit` where the command line
    has a mistake or asks for help.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a file name may hold what no encoding has
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], Answer] = args.run
    try:
        return _printed(run(args), as_json=args.json)
    except KeyboardInterrupt:
        print("zerort: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ZerortError, OSError) as error:
        print(f"zerort: {_reason(error)}", file=sys.stderr)
        return UNUSABLE
    except Exception:  # a mistake of ours: there is no answer, so the status is not 1
        traceback.print_exc()
        return UNUSABLE


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, ZerortError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _printed(answer: Answer, *, as_json: bool) -> int:
    try:
        if not answer.speaks:
            pass
        elif as_json:
            print(json.dumps(plain(answer.document), indent=2, allow_nan=False))
        else:
            answer.show(_Terminal())
        sys.stdout.flush()
    except OSError as error:
        _drop_stdout()
        if isinstance(error, BrokenPipeError):
            return UNREAD
        raise
    return answer.status


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Of rich's own there is status 1."""
        raise BrokenPipeError


def _drop_stdout() -> None:
    """Python flushes at its end, which would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def plain(value: Any) -> Any:
    """`value` in what JSON has. Raises `TypeError` for what has no place in a document."""
    if isinstance(value, (Enum, PurePath)):
        return value.value if isinstance(value, Enum) else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} in a document")


def grid(*headings: str, title: str | None = None) -> Table:
    """A table whose cells are folded where the terminal is narrow: a name is whole, or not one."""
    table = Table(title=None if title is None else Text(title), title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def shown(*parts: RenderableType) -> Callable[[Console], None]:
    """An answer's `show` that prints tables and texts one below the other. A string is printed as
    it is: brackets in it are no markup.
    """

    def show(console: Console) -> None:
        for part in parts:
            if isinstance(part, str):
                console.print(part, markup=False, highlight=False, soft_wrap=True)
            else:
                console.print(part)

    return show


@contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """A bar on stderr while the block runs, where that is a terminal; yields what moves it on by
    some of `total`, or only shows that there is life where that is None.
    """
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [] if total is None else [MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, under a bar."""
    with progress(what, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


def count(text: str) -> int:
    """The type of an argument that is 0, 1, 2, ..."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """The type of an argument that is 1, 2, 3, ..."""
    return _whole(text, 1)


def ranks(text: str) -> int:
    """The type of an argument that is a number of ranks."""
    return _whole(text, 1, 1 << 24)


def _whole(text: str, least: int, most: int = 1 << 53) -> int:
    digits = text.isascii() and text.isdigit() and len(text) < 20
    if not (digits and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, got {text!r}"
        )
    return int(text)


def elements(text: str) -> int:
    """The type of an argument that counts parameters, such as 350M, 7e9 or 7B."""
    scale = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        numel = int(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        numel = 0
    if not 0 < numel <= 2**53:
        raise argparse.ArgumentTypeError(f"expected a number such as 350M, 7e9 or 7B, got {text!r}")
    return numel
