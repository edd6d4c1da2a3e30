"""`comms_logger`: what each planned collective has taken, by kind and size.

How many there were, and of how many bytes, is known when one is launched. How long one took is from
its launch until its result could be taken: on the host by its clock, where the wait was over; on an
accelerator between two events in its streams, which are read when they have passed. A launch that
waits long for its turn to be retired counts as long, so a latency is an upper bound of what was on
the wire. Nothing here synchronises, and no rank hears of another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from zerort import _core
from zerort.trace.sink import DeviceEvent, Mark
from zerort.trace.watch import Collective

__all__ = ["CommunicationWatch", "Record", "bandwidths"]

_log = logging.getLogger("zerort")

_KEPT = 1000
"""Latencies of each kind and size that an average is trimmed over: the latest."""
_ENDINGS = ("_into_tensor", "_tensor", "_base")
"""What torch's names have behind the collective's."""


@dataclass
class Record:
    """Collectives of one kind and size."""

    count: int = 0
    total_ms: float = 0.0
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    @property
    def average_ms(self) -> float:
        """Of the latest, without the tenth that is longest and the tenth that is shortest."""
        times = sorted(self.latest)
        cut = round(len(times) / 10)
        kept = times[cut : len(times) - cut]
        return sum(kept) / len(kept) if kept else 0.0


def bandwidths(operation: str, size: int, milliseconds: float, world: int) -> tuple[float, float]:
    """Gigabits a second of one that took so long: of its whole result, and on the bus. `size` is
    bytes of each rank's part of an all-gather or a reduce-scatter, else of the whole.
    """
    if not milliseconds:
        return 0.0, 0.0
    gigabits = size * 8 / 1e6 / milliseconds
    match operation:
        case "all_gather" | "reduce_scatter":
            return gigabits * world, gigabits * (world - 1)
        case "all_reduce":
            return gigabits * 2, gigabits * 2 * (world - 1) / world
        case "all_to_all":
            return gigabits, gigabits * (world - 1) / world
        case _:
            return gigabits, gigabits


class CommunicationWatch:
    """Listens to the executor. `moment` records an event on the current stream, or is None where
    waiting blocks the host.
    """

    enabled = True
    times_gradients = False

    def __init__(
        self,
        world: int,
        operations: Sequence[str] | None,
        moment: Callable[[], DeviceEvent] | None,
        *,
        verbose: bool = False,
    ) -> None:
        self.world = world
        self._wanted = None if operations is None else frozenset(map(_plain, operations))
        self._moment = moment
        self._verbose = verbose
        self._records: dict[tuple[str, int], Record] = {}
        self._under_way: dict[str, tuple[str, int, float | DeviceEvent]] = {}
        self._pending: deque[tuple[str, int, DeviceEvent, DeviceEvent]] = deque()
        self._changing = threading.Lock()

    def records(self) -> dict[tuple[str, int], Record]:
        """By operation and bytes; of an accelerator's those whose events have passed are timed."""
        with self._changing:
            self._read()
            return dict(self._records)

    # What the executor tells.

    def mark(self) -> Mark:
        """No clock is read."""
        return 0

    def started(self, name: str, size: int, work: Collective) -> None:
        """A collective over `size` bytes, of all ranks' parts, has started; of an all-to-all, those
        that this rank sends.
        """
        operation = name.split(" ", maxsplit=1)[0]
        if self._wanted is not None and operation not in self._wanted:
            return
        with self._changing:
            part = size if operation == "all_to_all" else size // self.world
            self._records.setdefault((operation, part), Record()).count += 1
            self._under_way[name] = (operation, part, self._now())

    def landed(self, name: str) -> None:
        """Its wait is over."""
        with self._changing:
            operation, size, since = self._under_way.pop(name, ("", 0, 0.0))
            if not operation:
                return
            now = self._now()
            if isinstance(now, float) and isinstance(since, float):
                self._add(operation, size, 1000 * (now - since))
            elif not isinstance(now, float) and not isinstance(since, float):
                self._pending.append((operation, size, since, now))
                self._read()

    def launched(self, bucket: _core.Bucket, size: int, dtype: torch.dtype) -> None:
        """Known from its collective."""

    def waited(self, start: Mark, what: str) -> None:
        """The trace's."""

    def retired(self, bucket: _core.Bucket) -> None:
        """Known from its collective."""

    def gathered(self, unit: _core.Unit, size: int) -> None:
        """Known from its collectives."""

    def freed(self, unit: int) -> None:
        """No collective."""

    def passed(self, lives: Sequence[tuple[int, int, int, int, int]]) -> None:
        """The trace's."""

    def _now(self) -> float | DeviceEvent:
        return time.perf_counter() if self._moment is None else self._moment()

    def _read(self) -> None:
        while self._pending and self._pending[0][3].query():
            operation, size, since, now = self._pending.popleft()
            self._add(operation, size, since.elapsed_time(now))

    def _add(self, operation: str, size: int, took: float) -> None:
        record = self._records[operation, size]
        record.total_ms += took
        record.latest.append(took)
        if self._verbose:
            whole, bus = bandwidths(operation, size, took, self.world)
            _log.info(
                "comm op: %s | time (ms): %.2f | msg size: %d B | algbw (Gbps): %.2f | "
                "busbw (Gbps): %.2f",
                *(operation, took, size, whole, bus),
            )


def _plain(name: str) -> str:
    """A collective's name without the ending of torch's function."""
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name
