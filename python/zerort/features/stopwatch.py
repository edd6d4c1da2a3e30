"""`engine.timers`: timers by name, those of the engine and any of the user's own.

They take the host's time and synchronise nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Stopwatch", "Stopwatches"]


class Stopwatch:
    """One timer, of the laps since its last reset. Mirrors DeepSpeed's."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self.started_ = False
        self.laps: list[float] = []
        """In ms."""
        self._since = 0.0

    def start(self) -> None:
        """A lap begins; nothing where one has."""
        if not self.started_:
            self.started_, self._since = True, time.perf_counter()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """It ends; nothing where none has begun."""
        if self.started_:
            self.started_ = False
            self.laps.append(1000 * (time.perf_counter() - self._since))

    def reset(self) -> None:
        """Forgets all laps, and one that is under way."""
        self.started_ = False
        self.laps = []

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds of all laps, one that is under way included."""
        runs, now = self.started_, time.perf_counter()
        total = sum(self.laps) + (1000 * (now - self._since) if runs else 0.0)
        if reset:
            self.laps = []
            self._since = now
        return total

    def mean(self) -> float:
        """Milliseconds of a lap; 0 without any."""
        return sum(self.laps) / len(self.laps) if self.laps else 0.0


class _Off(Stopwatch):
    """Takes no time."""

    def start(self) -> None:
        """Nothing."""

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """Nothing."""


class Stopwatches:
    """By name: `timers("load").start()`. Where it is not enabled, one that does nothing."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._named: dict[str, Stopwatch] = {}

    def __call__(self, name: str) -> Stopwatch:
        """The timer of that name, made where there is none."""
        if not self._enabled:
            return _OFF
        return self._named.setdefault(name, Stopwatch(name))

    def get_timers(self) -> dict[str, Stopwatch]:
        """All of them."""
        return self._named

    def show(self, times: Mapping[str, float]) -> None:
        """The engine's own stand at these milliseconds."""
        for name, took in times.items():
            self(name).laps = [took]

    def get_mean(self, names: Iterable[str], **unused: Any) -> dict[str, float]:
        """Milliseconds of a lap of each of `names` that there is."""
        return {name: self._named[name].mean() for name in names if name in self._named}


_OFF = _Off("off")
