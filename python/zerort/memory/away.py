"""What stands for the optimizer's copy of a bucket's parameters on ranks that have none of it: the
parameters are exchanged, and each one's owner has the copy.

What it guarantees: what something outside a step has written into this rank's part shows, so that
ranks can bring it to the owners. What it does not do: it holds no copy, and it brings nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor

from zerort.memory.fingerprint import fingerprint
from zerort.memory.flat import Memory
from zerort.memory.moved import Carrier

__all__ = ["AwayMaster"]


class AwayMaster:
    """A `Master` without memory.

    Where parameters are sharded nothing writes into a rank's part but what says so. Elsewhere a
    write is found by the part's fingerprint.
    """

    __slots__ = ("_owned", "_said", "_seen", "_watches", "is_own", "noted", "tensor")

    def __init__(self, owned: Memory, precise: torch.dtype, *, watches: bool) -> None:
        self.tensor = torch.empty(0, dtype=precise, device=owned.tensor.device)
        self.is_own = owned.tensor.dtype != precise
        """Of the copy that is elsewhere."""
        self.noted: Tensor | None = None
        """By which later writes are found, where what stands there is not for the copy."""
        self._owned = owned
        self._watches = watches
        self._said = False
        self._seen: int | Tensor | None = None

    def written(self) -> bool:
        """Whether the copy has something to follow; asks the device."""
        if self._said or not self._watches:
            return self._said
        found = _mark_of(self._owned.tensor)
        if isinstance(found, Tensor) and isinstance(self._seen, Tensor):
            return bool(found.ne(self._seen).item())
        return found != self._seen

    def follow(self) -> None:
        """The owners take the parameters as they are, once all ranks have theirs."""
        self.lead()

    def lead(self) -> None:
        """What stands there now has come from the owners, or has gone to them."""
        self.noted = None
        self.see()

    def arrived(self, start: int, values: Tensor) -> None:
        """Some of it, (n,) from `start` on, has come from the owners; the rest is as it was."""
        if self.noted is not None:
            self.noted.narrow(0, start, values.numel()).copy_(values)
        self.see()

    def see(self) -> None:
        """What stands there now is known to the owners."""
        self._said = False
        if self._watches:
            self._seen = _mark_of(self._owned.tensor)

    def assign(self, start: int, values: Tensor) -> None:
        """There is nothing here to replace."""

    def take_writes(self) -> None:
        """Something has been written."""
        self._said = True

    def note_writes(self) -> None:
        """Keeps a copy of what stands there."""
        self.noted = self._owned.tensor.clone()
        self.see()

    def doubt(self) -> None:
        """It takes all ranks to follow."""

    def ready(self) -> None:
        """Always."""

    def move(self, carry: Carrier) -> None:
        """What was noted."""
        if self.noted is not None:
            self.noted = carry(self.noted)

    def parted(self) -> None:
        """It is asked where that is."""


def _mark_of(values: Tensor) -> int | Tensor:
    """Bits over what lies there: a number where the host has it, else on its device."""
    if values.device.type != "cpu":
        return fingerprint(values)
    array: Any = values.view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(array)
