"""`zerort trace`: its commands and their arguments."""

from __future__ import annotations

import argparse

from zerort.terminal import Answer, Commands, add_command, count
from zerort.trace.summary import summarise

__all__ = ["add_trace_commands"]


def add_trace_commands(commands: Commands) -> None:
    """Adds them to a command line."""
    summary = add_command(
        commands,
        "summary",
        _summary,
        help="where the time of a run went: tables of buckets and steps",
        example="zerort trace summary trace-0.json trace-1.json",
    )
    summary.add_argument(
        "files", nargs="+", metavar="FILE", help="trace files of one run, one for each rank"
    )
    summary.add_argument(
        "--steps",
        type=count,
        default=10,
        metavar="N",
        help="steps listed for each rank (default 10)",
    )


def _summary(args: argparse.Namespace) -> Answer:
    return summarise(args.files, last=args.steps)
