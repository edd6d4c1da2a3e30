"""Where a bucket's reduced gradient is, in the layout of its owned part.

What it guarantees: what one pass has left is there when the next adds to it, and whoever reads it
reads what is complete, as far as the device has come. What it does not do: no arithmetic.
"""

from __future__ import annotations

from typing import Protocol

import torch

from zerort.device import Host, Mark
from zerort.memory.flat import Memory
from zerort.memory.homes import HostRoom, Landing
from zerort.memory.moved import Carrier

__all__ = ["HostSums", "Sums", "SumsHere"]


class Sums(Protocol):
    """Of one bucket."""

    @property
    def whole(self) -> Memory:
        """What the optimizer steps with (owned numel,)."""

    @property
    def shard(self) -> Memory:
        """The part of it that this rank sums (shard numel,)."""

    def open(self, *, add: bool) -> Memory:
        """Where the shard's sum is to be written, on the device; with `add` what is there already.
        On the stream of sums, as `close`.
        """

    def close(self) -> None:
        """It has been written."""

    def move(self, carry: Carrier) -> None:
        """What lies on the device, elsewhere."""

    def release(self) -> None:
        """Gives back what is needed only while something is written."""


class SumsHere:
    """On the device."""

    __slots__ = ("shard", "whole")

    def __init__(self, whole: Memory, shard: Memory) -> None:
        self.whole = whole
        self.shard = shard

    def open(self, *, add: bool) -> Memory:
        """In place."""
        return self.shard

    def close(self) -> None:
        """It is there."""

    def move(self, carry: Carrier) -> None:
        """The whole, and with it the shard."""
        self.whole.move(carry)

    def release(self) -> None:
        """Nothing is."""


class HostSums:
    """On the host: written on the device, in a landing that all buckets share, and copied away
    beside the next bucket's sum.

    A pass that adds brings back what is there, so that all sums are the device's.
    """

    __slots__ = ("_landing", "_mark", "_memory", "_room")

    def __init__(self, room: HostRoom, numel: int, dtype: torch.dtype) -> None:
        self._room = room
        self._memory = Memory.of(room.host.zeros(numel, dtype))
        self._mark: Mark | None = None
        self._landing: Landing | None = None
        room.reserve(sums=numel * dtype.itemsize)

    @property
    def host(self) -> Host:
        """Where they are."""
        return self._room.host

    @property
    def whole(self) -> Memory:
        """Waits for the last copy: at the boundary it has passed."""
        if self._mark is not None:
            self._mark.wait()
            self._mark = None
        return self._memory

    @property
    def shard(self) -> Memory:
        """All of it: where an optimizer is at home on the host, it is sharded."""
        return self.whole

    def open(self, *, add: bool) -> Memory:
        """In a landing."""
        self._landing = self._room.landing()
        tensor = self._memory.tensor
        here = self._landing.open(tensor.dtype, tensor.numel())
        if add:
            if self._mark is not None:
                self._mark.order()
            self._room.host.send(here.tensor, tensor)
        return here

    def close(self) -> None:
        """A copy."""
        assert self._landing is not None
        self._mark = self._landing.take(self._memory.tensor)

    def move(self, carry: Carrier) -> None:
        """It is on the host."""

    def release(self) -> None:
        """The landings."""
        self._landing = None
        self._room.release()
