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

from zerort.device import device_for
from zerort.memory.values import Memory

__all__ = ["Master", "OwnMaster", "SameMaster", "master_of"]


class Master(Protocol):
    """Of one bucket's owned part, in its layout."""

    tensor: Tensor
    """(owned numel,), of at least fp32."""
    is_own: bool
    """Whether it is memory of its own."""

    def follow(self) -> None:
        """The parameters are what counts: the copy becomes them."""

    def lead(self) -> None:
        """The copy has been updated: the parameters become its cast."""

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces elements (n,) from `start` on, and the parameters with them."""

    def take_writes(self) -> None:
        """Follows what has been written into the parameters since."""

    def note_writes(self) -> None:
        """What stands in the parameters is not for the copy, although it is not its cast."""


class SameMaster:
    """Where parameters are as precise as the optimizer needs: they are the copy."""

    __slots__ = ("tensor",)

    is_own = False

    def __init__(self, owned: Memory) -> None:
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


def master_of(owned: Memory, precise: torch.dtype) -> Master:
    """In `precise`, of what a rank keeps."""
    return SameMaster(owned) if owned.tensor.dtype == precise else OwnMaster(owned, precise)
