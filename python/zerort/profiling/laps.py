"""Time that something took, summed: by the host's clock, or by the device's where the host runs
ahead.

On an accelerator a lap is two events in the stream. They are read late, so that no lap makes the
host wait; the time is the device's, and holds what it stood idle for the host.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any

from zerort.device import Device

__all__ = ["Laps", "seconds_between"]

_PENDING = 20_000
"""Laps that wait to be read: events take memory, and a long generation has millions."""


def seconds_between(begin: Any, end: Any) -> float:
    """Between two moments; waits for the device where they are its events."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Laps:
    """Sums of laps by what they are laps of."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._sums: dict[Hashable, float] = {}
        self._pending: list[tuple[Hashable, Any, Any]] = []

    def now(self) -> Any:
        """A moment: the host's, in seconds, or an event in the device's stream."""
        moment = self._device.moment()
        return time.perf_counter() if moment is None else moment

    def add(self, key: Hashable, since: Any) -> None:
        """A lap from `since` until now."""
        self._pending.append((key, since, self.now()))
        if len(self._pending) >= _PENDING:
            self._read()

    def seconds(self, key: Hashable) -> float | None:
        """The sum of the laps of `key`; None where it has none."""
        self._read()
        return self._sums.get(key)

    def clear(self) -> None:
        """Forgets all laps."""
        self._pending.clear()
        self._sums.clear()

    def _read(self) -> None:
        for key, begin, end in self._pending:
            self._sums[key] = self._sums.get(key, 0.0) + seconds_between(begin, end)
        self._pending.clear()
