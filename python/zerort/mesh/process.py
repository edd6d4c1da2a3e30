"""A process of the job, and what has become of it as far as its own host can see.

A process id means something only where it was given: on one machine since its start, in one
namespace of ids (a container usually has its own). There it names one process at a time, so the
time at which it began belongs to it. Where there is no /proc the host's name stands for the place
and the time is unknown: a process that is gone is still seen, one that is stopped is not.

What this module does not do: it sends no message. It looks.
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from zerort.platforms import HERE

__all__ = ["Process", "this_process"]

_PROC = Path("/proc")
_STATE, _STARTED, _EXIT_CODE = 0, 19, 49  # fields of /proc/PID/stat behind the name, see proc(5)


@dataclass(frozen=True)
class Process:
    """A process, so named that no two have the same name."""

    host: str
    pid: int
    place: str
    """The machine's start and the namespace of ids; empty where the system does not say."""
    began: int | None
    """In clock ticks since the machine's start; None where the system does not say."""

    def beside(self, other: Process) -> bool:
        """Whether each sees the other by its id."""
        return (self.host, self.place) == (other.host, other.place)

    def fate(self) -> str | None:
        """What has become of a process `beside` this one: a verb phrase; None while it runs."""
        if not self.place:
            return None if HERE.running(self.pid) else "has exited"
        fields = _stat(self.pid)
        if fields is None:
            return None if HERE.running(self.pid) else "has exited"
        if self.began is not None and int(fields[_STARTED]) != self.began:
            return "has exited"  # and its id is another's now
        match fields[_STATE]:
            case "Z" | "X":
                return _ended(int(fields[_EXIT_CODE]))
            case "T" | "t":
                return "is stopped"
            case _:
                return None


def this_process() -> Process:
    """The process that calls."""
    fields = _stat(os.getpid()) if _proc_is_ours() else None
    began = None if fields is None else int(fields[_STARTED])
    return Process(socket.gethostname(), os.getpid(), "" if fields is None else _place(), began)


def _proc_is_ours() -> bool:
    """Whether /proc is there and shows the ids of this process's own namespace."""
    try:
        return os.readlink(_PROC / "self") == str(os.getpid())
    except OSError:
        return False


def _place() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> list[str] | None:
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields if len(fields) > _EXIT_CODE else None


def _ended(status: int) -> str:
    """Of a process whose parent has not fetched its status yet."""
    number = status & 0x7F
    if number:
        try:
            return f"was killed by {signal.Signals(number).name}"
        except ValueError:
            return f"was killed by signal {number}"
    code = status >> 8
    return f"has exited with code {code}" if code else "has exited"
