"""`zerort doctor`: its arguments and what it answers."""

from __future__ import annotations

import argparse

from rich.table import Table
from rich.text import Text

from zerort.doctor.names import findings
from zerort.terminal import Answer, Commands, add_command, shown

__all__ = ["add_doctor_command"]


def add_doctor_command(commands: Commands) -> None:
    """Adds it to a command line."""
    add_command(
        commands,
        "doctor",
        _doctor,
        help="which versions are installed, and who answers to `import deepspeed`",
        example="zerort doctor",
    )


def _doctor(args: argparse.Namespace) -> Answer:
    rows, refused = findings()
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return Answer({"rows": dict(rows)}, shown(table), 1 if refused else 0)
