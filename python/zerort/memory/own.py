"""The part of a bucket that a rank keeps, and its way to the whole and back.

What it guarantees: where it is the host's memory beside a device, the host does not write it while
it is on its way, and finds what has been written into the whole meanwhile without a copy of it.
What it does not do: it does not know what parameters lie in it.
"""

from __future__ import annotations

from torch import Tensor

from zerort.device import LINE, Host, Mark, device_for
from zerort.memory.fingerprint import first_of, line_prints
from zerort.memory.flat import Memory

__all__ = ["OwnPart"]


class OwnPart:
    """Of one bucket, from element `start` on. It is `memory`, of the device, or of the `host`
    beside it. `revision` counts how often it has been replaced, or has gone elsewhere.
    """

    __slots__ = ("_crossing", "_lines", "host", "memory", "revision", "start")

    def __init__(self, memory: Memory, start: int, host: Host | None = None) -> None:
        self.memory = memory
        self.start = start
        self.host = host
        self.revision = 0
        self._crossing: Mark | None = None
        self._lines: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """Its elements (numel,)."""
        return self.memory.tensor

    def reserve(self, numel: int) -> bool:
        """Memory for it, unless there is; returns whether it is new."""
        own = self.tensor
        if own.numel():
            return False
        if self.host is None:
            self.memory = Memory.zeros(numel, own.dtype, own.device)
        else:
            self.memory = Memory.of(self.host.zeros(numel, own.dtype))
        return True

    def release(self) -> Tensor:
        """Gives it to who has it from now on."""
        own = self.tensor
        self.memory = Memory.zeros(0, own.dtype, own.device)
        return own

    def send(self, place: Tensor) -> None:
        """Into its `place` (numel,) in the whole."""
        if self.host is None:
            place.copy_(self.tensor)
            return
        self._crossing = self.host.send(place, self.tensor)
        self._lines = line_prints(place, LINE)

    def receive(self, place: Tensor) -> None:
        """The other way; the host waits where it is its memory."""
        self.replaced()
        if self.host is None:
            self.tensor.copy_(place)
            return
        self.host.receive(self.tensor, place).wait()
        self._crossing = None
        self._lines = line_prints(place, LINE)

    def replaced(self) -> None:
        """It has been, or has gone elsewhere."""
        self.revision += 1

    def leave(self, until: Mark | None) -> None:
        """It is read `until` then, on its way."""
        self._crossing = until

    def ready(self) -> None:
        """The host may write it."""
        if self._crossing is not None:
            self._crossing.wait()
            self._crossing = None

    def first_change(self, place: Tensor) -> int | Tensor | None:
        """The first `LINE` in which its `place` in the whole is not what it was sent as."""
        if self._lines is not None:
            return first_of(line_prints(place, LINE) != self._lines)
        return device_for(self.tensor.device).first_difference(place, self.tensor)

    def freed(self) -> None:
        """There is no whole any more."""
        self._lines = None
