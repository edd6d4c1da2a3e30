"""`zerort doctor`: its arguments, its checks and what it answers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zerort.doctor.devices import devices
from zerort.doctor.finding import Check, Finding, Level, Machine, looked_into, problem
from zerort.doctor.job import gathered, is_job, met, together
from zerort.doctor.limits import cpus, limits, memory, shared_memory
from zerort.doctor.network import (
    environment,
    gloo,
    interfaces,
    nccl_interfaces,
    ports,
    time_outs,
)
from zerort.doctor.pair import self_test
from zerort.doctor.software import back_ends, nccl, versions
from zerort.errors import CommError, ZerortError
from zerort.mesh import Mesh
from zerort.terminal import FOUND, Answer, Commands, Parser, add_command, as_command, progress

__all__ = ["CHECKS", "add_doctor_command", "doctor_parser"]

CHECKS: dict[str, Check] = {
    "versions": versions,
    "back ends": back_ends,
    "NCCL": nccl,
    "devices": devices,
    "interfaces": interfaces,
    "gloo": gloo,
    "NCCL's sockets": nccl_interfaces,
    "environment": environment,
    "ports": ports,
    "time-outs": time_outs,
    "/dev/shm": shared_memory,
    "limits": limits,
    "memory": memory,
    "CPUs": cpus,
}
"""What is looked into, in the order in which it is said."""

_ALIKE = ("zerort", "torch", "Python", "NCCL")
"""What the ranks of a job have to have alike."""

_HELP = "whether this machine and this job can train: each line ok, note or problem, and the remedy"
_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}


def add_doctor_command(commands: Commands) -> None:
    """Adds it to a command line."""
    _arguments(
        add_command(commands, "doctor", _doctor, help=_HELP, example="zerort doctor --quick")
    )


def doctor_parser() -> Parser:
    """Of the command alone, for `python -m zerort.doctor`."""
    parser = as_command(Parser(prog="python -m zerort.doctor", description=_HELP), _doctor)
    _arguments(parser)
    parser.epilog = "example:\n  torchrun --nproc_per_node=2 -m zerort.doctor"
    return parser


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="leave the collectives out, which take seconds"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds that ranks may take to meet and to try their collectives (default 60)",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds from 1 to 86400, got {text!r}")
    return seconds


def _doctor(args: argparse.Namespace) -> Answer:
    machine = Machine()
    with progress("looking", len(CHECKS)) as advance:
        found: list[Finding] = []
        for name, check in CHECKS.items():
            found += looked_into({name: check}, machine)
            advance(1)
    speaks, ranks = True, 1
    if is_job(machine):
        found, speaks, ranks = _of_job(machine, args, found)
    elif not args.quick:
        with progress("two ranks try their collectives"):
            tests: dict[str, Check] = {"self-test": lambda at: self_test(at, args.timeout)}
            found += looked_into(tests, machine)
    return _answer(found, ranks, speaks=speaks)


def _of_job(
    machine: Machine, args: argparse.Namespace, own: list[Finding]
) -> tuple[list[Finding], bool, int]:
    """What all ranks find, whether this one says it, and how many there are."""
    speaks = machine.number("RANK") == 0
    try:
        mesh = met(args.timeout)
    except Exception as error:
        if not speaks:  # rank 0 may be out of reach, and this rank's reason is the one that counts
            raise CommError(
                f"rank {machine.environ['RANK']} did not meet the others: {error}"
            ) from error
        reason = " ".join(str(error).split())
        remedy = "the ranks' own lines say why; GLOO_SOCKET_IFNAME names the interface they use"
        return [*own, problem("ranks", f"they did not meet: {reason}", remedy)], True, 1
    try:
        found = gathered(mesh, own, _ALIKE)
        if not args.quick:
            found += _tried(mesh)
        return found, speaks, mesh.world
    finally:
        mesh.close()


def _tried(mesh: Mesh) -> Iterator[Finding]:
    try:
        yield from together(mesh)
    except ZerortError as error:
        reason = " ".join(str(error).split())
        yield problem("collectives", reason, "look at the rank that is named")


def _answer(found: Sequence[Finding], ranks: int, *, speaks: bool) -> Answer:
    problems = sum(one.level is Level.PROBLEM for one in found)
    notes = sum(one.level is Level.NOTE for one in found)

    def show(console: Console) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for one in found:
            text = Text(one.text)
            if one.remedy:
                text.append(f"\n-> {one.remedy}", style="bold")
            table.add_row(Text(one.level.value, style=_STYLES[one.level]), Text(one.check), text)
        console.print(table)
        console.print(
            f"{_counted(problems, 'problem')}, {_counted(notes, 'note')}", highlight=False
        )

    document = {"ranks": ranks, "problems": problems, "notes": notes, "findings": list(found)}
    return Answer(document, show, FOUND if problems and speaks else 0, speaks)


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
