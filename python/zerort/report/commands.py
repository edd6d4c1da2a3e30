"""`zerort trace`: its commands and their arguments.

A file that cannot be used is one line on stderr and status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from rich.console import Console

from zerort.trace.reader import TraceError
from zerort.trace.summary import summarise

__all__ = ["add_trace_commands"]

_Commands = argparse._SubParsersAction
_Run = Callable[[argparse.Namespace, Console], int]


def add_trace_commands(commands: _Commands[argparse.ArgumentParser]) -> None:
    """Adds them to a command line."""
    summary = commands.add_parser(
        "summary", help="where the time of a run went: tables of buckets and steps"
    )
    summary.add_argument(
        "files", nargs="+", metavar="FILE", help="trace files of one run, one for each rank"
    )
    summary.add_argument(
        "--steps",
        type=_count,
        default=10,
        metavar="N",
        help="steps listed for each rank (default 10)",
    )
    summary.set_defaults(run=_refusing(_summary))


def _refusing(run: _Run) -> _Run:
    """`run`, with status 2 where its input cannot be used."""

    def refusing(args: argparse.Namespace, console: Console) -> int:
        try:
            return run(args, console)
        except TraceError as error:
            print(f"zerort: {error}", file=sys.stderr)
            return 2

    return refusing


def _summary(args: argparse.Namespace, console: Console) -> int:
    summarise(args.files, console, last=args.steps)
    return 0


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {count}")
    return count
