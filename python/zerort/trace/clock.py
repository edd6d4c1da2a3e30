"""From moments to nanoseconds of one time axis.

The axis is the host's calendar, counted from the start of 2025 (UTC), so that ranks line up: those
of one host within microseconds, those of several as well as their clocks agree. It is read once;
from then on `time.perf_counter_ns` counts, which a correction of the calendar does not bend. From
1970 a trace's 64-bit floats could not hold nanoseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone

from zerort.trace.sink import DeviceEvent

__all__ = ["DeviceClock", "axis_offset"]

_ORIGIN_NS = int(datetime(2025, 1, 1, tzinfo=timezone.utc).timestamp()) * 10**9
_REBASE_NS = 10**9


def axis_offset() -> int:
    """Nanoseconds to add to `perf_counter_ns` for a time on the axis; the tightest of a few
    readings.
    """
    readings = []
    for _ in range(5):
        before = time.perf_counter_ns()
        calendar = time.time_ns()
        after = time.perf_counter_ns()
        readings.append((after - before, calendar - _ORIGIN_NS - (before + after) // 2))
    return min(readings)[1]


class DeviceClock:
    """The host's time of events on a device, from their distance to one whose time the host saw.

    A device gives a distance as a 32-bit float of milliseconds: good to 60 ns over a second, to a
    quarter of a millisecond over an hour. The event measured from therefore moves along, a second
    at a time.
    """

    def __init__(self, record: Callable[[], DeviceEvent]) -> None:
        self._base = record()
        self._base.synchronize()
        self._base_ns = time.perf_counter_ns()

    def ns(self, event: DeviceEvent) -> int:
        """The `perf_counter_ns` at which the stream passed `event`, which it has."""
        elapsed = round(self._base.elapsed_time(event) * 1e6)
        at = self._base_ns + elapsed
        if elapsed > _REBASE_NS:
            self._base, self._base_ns = event, at
        return at
