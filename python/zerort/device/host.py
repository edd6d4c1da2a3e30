"""The host's memory beside an accelerator's, and copies between the two.

Copies run on the current stream, behind what is enqueued there, and leave a mark. In page-locked
memory they make nobody wait; torch's caching allocator of such memory gives a piece out again only
behind the copies that use it. In other memory the host may stand still until a copy is over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["AcceleratorHost", "AcceleratorMark"]


class AcceleratorMark:
    """A moment of a stream, behind a copy."""

    __slots__ = ("_event",)

    def __init__(self, place: torch.device) -> None:
        self._event: Any = torch.accelerator.current_stream(place).record_event()

    def wait(self) -> None:
        """The host stands still until it has passed."""
        self._event.synchronize()


class AcceleratorHost:
    """Of one accelerator. `pinned` asks for page-locked memory."""

    def __init__(self, place: torch.device, *, pinned: bool) -> None:
        self.pinned = pinned
        self.sent = self.received = 0
        self._place = place

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Touched, as memory of the device is."""
        return torch.zeros(numel, dtype=dtype, pin_memory=self.pinned)

    def receive(self, here: Tensor, there: Tensor) -> AcceleratorMark:
        """From the device."""
        self.received += there.nbytes
        here.copy_(there, non_blocking=True)
        return AcceleratorMark(self._place)

    def send(self, there: Tensor, here: Tensor) -> AcceleratorMark:
        """To the device."""
        self.sent += here.nbytes
        there.copy_(here, non_blocking=True)
        return AcceleratorMark(self._place)
