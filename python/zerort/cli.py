"""The command `zerort`: looks at what a run is given and what it leaves behind. It starts nothing
and changes nothing of that; what it converts it writes beside it.

A command is a function from its arguments and a console to an exit status. What cannot be read is
one line on stderr and status 1, a configuration with mistakes is status 1 under its table, and a
command line with mistakes is status 2, as are traces that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zerort.checkpoint.commands import add_commands
from zerort.config import describe
from zerort.doctor import findings
from zerort.errors import ZerortError
from zerort.forecast.commands import add_arguments, is_asked, print_forecast
from zerort.report.commands import add_trace_commands

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace, Console], int] = args.run
    try:
        return run(args, Console())
    except (ZerortError, OSError) as error:
        print(f"zerort: {error}", file=sys.stderr)
        return 1


def _config(args: argparse.Namespace, console: Console) -> int:
    rows = describe(args.file)
    table = Table("key", "value", "effect", title=Text(args.file), title_justify="left")
    for row in rows:
        table.add_row(
            *map(Text, row)
        )  # a value may hold brackets, which are markup in a plain string
    console.print(table)
    if any(effect.startswith("error") for _, _, effect in rows):
        return 1
    if is_asked(args):
        print_forecast(args, console)
    return 0


def _doctor(args: argparse.Namespace, console: Console) -> int:
    rows, refused = findings()
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="zerort", description="Looks into configurations, traces and checkpoints of zerort."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    add_trace_commands(
        commands.add_parser("trace", help="traces of a run").add_subparsers(
            required=True, metavar="COMMAND"
        )
    )

    config = commands.add_parser("config", help="what each key of a configuration does")
    config.add_argument("file", metavar="FILE", help="a configuration in JSON")
    add_arguments(config)
    config.set_defaults(run=_config)

    doctor = commands.add_parser(
        "doctor", help="which versions are installed, and who answers to `import deepspeed`"
    )
    doctor.set_defaults(run=_doctor)

    add_commands(
        commands.add_parser("ckpt", help="checkpoints").add_subparsers(
            required=True, metavar="COMMAND"
        )
    )
    return top


if __name__ == "__main__":
    sys.exit(main())
