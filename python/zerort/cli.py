"""The command `zerort`: looks at what a run is given and what it leaves behind. It changes nothing
of that; what it converts or draws it writes beside it.

Here is only which commands there are. Each comes from the room that it is about, through a function
`add_...`; what all of them have in common, their exit statuses too, is in `terminal`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from zerort._core import __version__
from zerort.checkpoint.commands import add_checkpoint_commands
from zerort.doctor.commands import add_doctor_command
from zerort.forecast.commands import add_config_command
from zerort.forecast.estimate import add_estimate_command
from zerort.report.commands import add_trace_commands
from zerort.simulate.commands import add_simulate_command
from zerort.terminal import Parser, add_group, execute
from zerort.tune.commands import add_tune_command

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    return execute(parser(), argv)


def parser() -> Parser:
    """Of the whole command line."""
    top = Parser(
        prog="zerort",
        description="Looks into configurations, traces, checkpoints and the machine of a run.",
        epilog="`zerort COMMAND --help` ends with an example. The exit status is 1 where something "
        "is not as it should be, and 2 where there is no answer.",
    )
    top.add_argument("--version", action="version", version=f"zerort {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_config_command(commands)
    add_estimate_command(commands)
    add_simulate_command(commands)
    add_trace_commands(add_group(commands, "trace", help="where the time of a run went"))
    add_checkpoint_commands(add_group(commands, "ckpt", help="checkpoints, and what is in them"))
    add_doctor_command(commands)
    add_tune_command(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
