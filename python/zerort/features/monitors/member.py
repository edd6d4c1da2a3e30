"""What a monitor is: the protocol, and what members need to open themselves.

A member is one destination that events are written to. It is made, written and closed on rank 0
alone, and it may raise whenever it likes: `monitor.Monitor` is what contains it.
"""

from __future__ import annotations

import importlib
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from zerort.config.monitors import MonitorFolder
from zerort.errors import ConfigError

__all__ = ["Event", "Member", "by_step", "folder_of", "required"]


class Event(NamedTuple):
    """One reading."""

    name: str
    """As DeepSpeed names it: Train/Samples/lr."""
    value: float
    step: int
    """Samples that training has seen over all ranks."""


class Member(Protocol):
    """Where events go."""

    def write(self, events: Sequence[Event]) -> None:
        """Takes the events of a boundary, or some of the user's own. What it returns from is safe
        from a crash of this process, or under way to a server.
        """

    def close(self) -> None:
        """Nothing is written any more."""


def by_step(events: Sequence[Event]) -> Mapping[int, Mapping[str, float]]:
    """Values by name, of each step together, as services take them that have one row a step."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for name, value, step in events:
        found[step][name] = value
    return found


def required(module: str, key: str, install: str) -> Any:
    """The module of an optional package. Raises `ConfigError` where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key} needs the package {install}, of which {module} cannot be imported ({error}): "
            f'pip install {install}, or set "enabled": false'
        ) from error


def folder_of(settings: MonitorFolder, key: str) -> Path:
    """The job's folder, made and absolute. Raises `ConfigError` where nothing can be written."""
    folder = Path(settings.output_path, settings.job_name).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}.output_path: expected a folder that can be written, got {str(folder)!r} "
            f"({error})"
        ) from error
    return folder
