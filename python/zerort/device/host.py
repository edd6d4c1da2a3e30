"""The host's memory beside an accelerator's, and copies between the two.

Copies run behind what is enqueued on the current stream, and leave a mark: on that stream, or, for
what is taken from a landing, on a stream of copies, so that what is enqueued next runs beside them.
In page-locked memory they make nobody wait; torch's caching allocator of such memory gives a piece
out again only behind the copies that use it. In other memory the host may stand still until a copy
is over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["AcceleratorHost", "AcceleratorMark"]


class AcceleratorMark:
    """A moment of the current stream."""

    __slots__ = ("_event", "_place")

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._event: Any = torch.accelerator.current_stream(place).record_event()

    def wait(self) -> None:
        """The host stands still until it has passed."""
        self._event.synchronize()

    def order(self) -> None:
        """The current stream does."""
        torch.accelerator.current_stream(self._place).wait_event(self._event)


class AcceleratorHost:
    """Of one accelerator. `pinned` asks for page-locked memory; within `on(stream)` that stream is
    the current one.
    """

    def __init__(
        self,
        place: torch.device,
        on: Callable[[Any], AbstractContextManager[None]],
        *,
        pinned: bool,
    ) -> None:
        self.pinned = pinned
        self.sent = self.received = 0
        self._place = place
        self._on = on
        self._copies: Any = None

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Touched, as memory of the device is."""
        return torch.zeros(numel, dtype=dtype, pin_memory=self.pinned)

    def landing(self, nbytes: int) -> tuple[Tensor, AcceleratorMark]:
        """Of the stream of copies, which is the last to use it: so it may be given back while a
        copy is under way.
        """
        if self._copies is None:
            self._copies = torch.Stream(self._place)
        with self._on(self._copies):
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._place).zero_()
            return memory, AcceleratorMark(self._place)

    def take(self, here: Tensor, there: Tensor) -> AcceleratorMark:
        """On the stream of copies."""
        self._copies.wait_stream(torch.accelerator.current_stream(self._place))
        with self._on(self._copies):
            return self.receive(here, there)

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
