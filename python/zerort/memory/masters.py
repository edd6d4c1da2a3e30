"""The optimizer's copy of what a rank keeps of a bucket's parameters.

What it guarantees: after a step the parameters are the copy's cast, and what something outside a
step has written into the parameters is in the copy before the next one; of the elements that were
not written the copy keeps what it knows more. What it does not do: no communication, no knowledge
of steps.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from zerort.device import Host, Mark, device_for
from zerort.memory.fingerprint import fingerprint
from zerort.memory.flat import Memory
from zerort.memory.homes import HostRoom
from zerort.memory.moved import Carrier

__all__ = ["DeviceMaster", "HostMaster", "Master", "OwnMaster", "SameMaster"]


class Master(Protocol):
    """Of one bucket's owned part, in its layout."""

    tensor: Tensor
    """(owned numel,), of at least fp32."""
    is_own: bool
    """Whether it is memory of its own."""

    def follow(self) -> None:
        """The parameters are what counts: the copy becomes them."""

    def lead(self) -> Mark | None:
        """The copy has been updated: the parameters become its cast. Returns a moment behind that,
        where these are on the host and it is the device's doing.
        """

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces elements (n,) from `start` on, and the parameters with them."""

    def take_writes(self) -> None:
        """Follows what has been written into the parameters since."""

    def note_writes(self) -> None:
        """What stands in the parameters is not for the copy, although it is not its cast."""

    def doubt(self) -> Tensor | None:
        """A scalar, not 0 where `take_writes` has something to do; None where that finds out by
        itself, for nothing.
        """

    def ready(self) -> None:
        """The host may write the copy."""

    def move(self, carry: Carrier) -> None:
        """What it has on the device of its own, elsewhere: `tensor` is another then."""

    def parted(self) -> None:
        """The parameters' part has moved."""


class SameMaster:
    """Where parameters are as precise as the optimizer needs: they are the copy."""

    __slots__ = ("_owned", "tensor")

    is_own = False

    def __init__(self, owned: Memory) -> None:
        self._owned = owned
        self.tensor = owned.tensor

    def follow(self) -> None:
        """It is they."""

    def lead(self) -> None:
        """They are it."""

    def assign(self, start: int, values: Tensor) -> None:
        """One write."""
        self.tensor.narrow(0, start, values.numel()).copy_(values)

    def take_writes(self) -> None:
        """Written is written."""

    def note_writes(self) -> None:
        """Nothing tells them apart."""

    def doubt(self) -> None:
        """Nothing is to be done."""

    def ready(self) -> None:
        """Always."""

    def move(self, carry: Carrier) -> None:
        """It has nothing."""

    def parted(self) -> None:
        """It is they."""
        self.tensor = self._owned.tensor


class OwnMaster:
    """Beside parameters of lower precision, on their device.

    Written is an element that has other bits than its master's cast, or, behind `note_writes`, than
    it had then.
    """

    __slots__ = ("_memory", "_noted", "_owned", "tensor")

    is_own = True

    def __init__(self, owned: Memory, precise: torch.dtype) -> None:
        self.tensor = owned.tensor.to(precise)
        self._owned = owned
        self._memory = Memory.of(self.tensor)
        self._noted: Tensor | None = None

    def follow(self) -> None:
        """Widened."""
        with torch.no_grad():
            self.tensor.copy_(self._owned.tensor)
        self._noted = None

    def lead(self) -> None:
        """A cast."""
        self._owned.tensor.copy_(self.tensor)
        self._noted = None

    def assign(self, start: int, values: Tensor) -> None:
        """And a cast of these."""
        length = values.numel()
        written = self.tensor.narrow(0, start, length)
        written.copy_(values)
        owned = self._owned.tensor.narrow(0, start, length)
        owned.copy_(written)
        if self._noted is not None:
            self._noted.narrow(0, start, length).copy_(owned)

    def take_writes(self) -> None:
        """Bit by bit."""
        if self._noted is None:
            device_for(self.tensor.device).take_writes(self._owned, self._memory)
            return
        values = self._owned.tensor
        written = values.view(torch.int16) != self._noted.view(torch.int16)
        torch.where(written, values, self.tensor, out=self.tensor)

    def note_writes(self) -> None:
        """Keeps a copy of what stands there, by which later writes are found."""
        self._noted = self._owned.tensor.clone()

    def doubt(self) -> None:
        """A comparison costs no wait."""

    def ready(self) -> None:
        """Always."""

    def move(self, carry: Carrier) -> None:
        """And what was noted."""
        self._memory.move(carry)
        self.tensor = self._memory.tensor
        if self._noted is not None:
            self._noted = carry(self._noted)

    def parted(self) -> None:
        """It is asked where that is."""


class HostMaster:
    """On the host, beside parameters on the device, of their dtype or of more.

    What is written into the parameters shows by their fingerprint, which stays on the device: they
    come to the host only where it has changed.
    """

    __slots__ = ("_mark", "_noted", "_owned", "_room", "_seen", "tensor")

    is_own = True

    def __init__(self, owned: Memory, precise: torch.dtype, room: HostRoom) -> None:
        self.tensor = room.host.zeros(owned.tensor.numel(), precise)
        self._owned, self._room = owned, room
        self._mark: Mark | None = None
        self._noted: Tensor | None = None
        self._seen: Tensor | None = None
        room.reserve(values=owned.tensor.nbytes)

    def follow(self) -> None:
        """Widened on the host, which waits."""
        self.ready()
        with torch.no_grad():
            self.tensor.copy_(self._brought(self._owned.tensor))
        self._noted = None
        self._see()

    def lead(self) -> None:
        """Cast on the host."""
        owned = self._owned.tensor
        if owned.dtype == self.tensor.dtype:
            self._mark = self._room.host.send(owned, self.tensor)
        else:
            self._room.send_cast(owned, self.tensor)
        self._noted = None
        self._see()

    def assign(self, start: int, values: Tensor) -> None:
        """And a cast of these."""
        self.ready()
        length = values.numel()
        written = self.tensor.narrow(0, start, length)
        written.copy_(values)
        owned = self._owned.tensor.narrow(0, start, length)
        owned.copy_(written.to(owned.dtype))
        if self._noted is not None:
            self._noted.narrow(0, start, length).copy_(owned)
        self._see()

    def take_writes(self) -> None:
        """Bit by bit, on the host."""
        if not self.doubt().item():
            return
        self.ready()
        values = self._brought(self._owned.tensor)
        cast = self.tensor.to(values.dtype)
        before = cast if self._noted is None else self._brought(self._noted)
        bits = _BITS[values.dtype.itemsize]
        # a cast may give a NaN another payload than it has
        same = (values.view(bits) == before.view(bits)) | (values.isnan() & before.isnan())
        torch.where(same, self.tensor, values, out=self.tensor)
        self._see()

    def note_writes(self) -> None:
        """Keeps a copy on the device."""
        self._noted = self._owned.tensor.clone()
        self._see()

    def doubt(self) -> Tensor:
        """Compared on the device."""
        assert self._seen is not None
        return fingerprint(self._owned.tensor).ne(self._seen)

    def ready(self) -> None:
        """Behind the last copy of it."""
        if self._mark is not None:
            self._mark.wait()
            self._mark = None

    def move(self, carry: Carrier) -> None:
        """What was noted: all else is on the host."""
        if self._noted is not None:
            self._noted = carry(self._noted)

    def parted(self) -> None:
        """It is asked where that is."""

    def _see(self) -> None:
        self._seen = fingerprint(self._owned.tensor)

    def _brought(self, there: Tensor) -> Tensor:
        here = self._room.host.zeros(there.numel(), there.dtype)
        self._room.host.receive(here, there).wait()
        return here


class DeviceMaster:
    """On the device, beside a shard of sharded parameters on the host.

    Nothing writes into such a shard but what takes the writes then.
    """

    __slots__ = ("_host", "_owned", "tensor")

    is_own = True

    def __init__(
        self, owned: Memory, precise: torch.dtype, host: Host, place: torch.device
    ) -> None:
        self.tensor = torch.zeros(owned.tensor.numel(), dtype=precise, device=place)
        self._owned, self._host = owned, host

    def follow(self) -> None:
        """Widened on the device."""
        with torch.no_grad():
            self.tensor.copy_(self._sent())

    def lead(self) -> Mark:
        """Cast on the device."""
        owned = self._owned.tensor
        return self._host.receive(owned, self.tensor.to(owned.dtype))

    def assign(self, start: int, values: Tensor) -> None:
        """And a cast of these."""
        length = values.numel()
        written = self.tensor.narrow(0, start, length)
        written.copy_(values)
        owned = self._owned.tensor.narrow(0, start, length)
        owned.copy_(written.to(owned.dtype))

    def take_writes(self) -> None:
        """On the device."""
        master = Memory.of(self.tensor)
        device_for(self.tensor.device).take_writes(Memory.of(self._sent()), master)

    def note_writes(self) -> None:
        """Nobody writes what is not for the copy."""

    def doubt(self) -> None:
        """Nothing writes but what says so."""

    def ready(self) -> None:
        """The host writes nothing here."""

    def move(self, carry: Carrier) -> None:
        """All of it."""
        self.tensor = carry(self.tensor)

    def parted(self) -> None:
        """It is asked where that is."""

    def _sent(self) -> Tensor:
        here = self._owned.tensor
        there = torch.empty(here.numel(), dtype=here.dtype, device=self.tensor.device)
        self._host.send(there, here)
        return there


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
