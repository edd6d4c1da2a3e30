"""What a check is given and what it says."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

__all__ = ["Check", "Finding", "Level", "Machine", "looked_into", "note", "ok", "problem"]


class Level(Enum):
    """How good it is."""

    OK = "ok"
    NOTE = "note"
    """A run goes on with it, but it is worth knowing."""
    PROBLEM = "problem"
    """A run fails by it, or will."""


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    """What to do, where there is something."""


def ok(check: str, text: str) -> Finding:
    """As it should be."""
    return Finding(check, Level.OK, text)


def note(check: str, text: str, remedy: str = "") -> Finding:
    """Worth knowing."""
    return Finding(check, Level.NOTE, text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    """What a run fails by."""
    return Finding(check, Level.PROBLEM, text, remedy)


def _limits(name: str) -> tuple[int, int] | None:
    """The soft and the hard limit of a resource, negative where there is none; None where the
    system has no such.
    """
    try:
        import resource  # noqa: PLC0415 (there is none on Windows)
    except ImportError:
        return None
    return resource.getrlimit(getattr(resource, name))


def _space(path: Path) -> tuple[int, int]:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


@dataclass(frozen=True)
class Machine:
    """Where it is looked: this one, or what a test puts in its place."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    root: Path = Path("/")
    """Below it are /proc, /sys and /dev."""
    hostname: str = field(default_factory=socket.gethostname)
    limits: Callable[[str], tuple[int, int] | None] = _limits
    space: Callable[[Path], tuple[int, int]] = _space
    """Bytes in all and bytes free of a file system."""

    def text(self, path: str) -> str | None:
        """What stands in a file below `root`; None where there is none."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def number(self, name: str) -> int | None:
        """A variable that is a number; None where it is not set or none."""
        text = self.environ.get(name, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


Check = Callable[[Machine], Iterable[Finding]]


def looked_into(checks: Mapping[str, Check], machine: Machine) -> Iterator[Finding]:
    """What all of them say. One that raises is a note."""
    for name, check in checks.items():
        try:
            yield from list(check(machine))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield note(name, f"could not be looked into: {reason}")
