"""What rounding has left out of a gradient, to be added to the next one.

The first pass of a window reads what is kept, and writes beside it; the others read and write
there. When the window is over, that is what is kept if it was applied; else nothing has changed.

What it guarantees: passes of a window follow one another, and a window that is dropped leaves no
trace. Each of the two takes 2 bytes an element, in the units of the gradient that is encoded, which
follow the loss scale. What it does not do: no arithmetic on elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zerort.device import residual_bytes
from zerort.memory import Memory

__all__ = ["Residual"]


class Residual:
    """Of `world` shards of `shard` elements; zero at first."""

    def __init__(self, shard: int, world: int, device: torch.device) -> None:
        self._units = 2 * shard
        self._world = world
        length = residual_bytes(shard, world)
        self._before, self._now = (Memory.zeros(length, torch.uint8, device) for _ in range(2))
        self._written = False

    def turn(self) -> tuple[Memory | None, Memory]:
        """Where a pass reads, if not where it writes, and where it writes."""
        before = None if self._written else self._before
        self._written = True
        return before, self._now

    def close(self, *, applied: bool, growth: float) -> None:
        """The window is over; from now on gradients are `growth` times as large."""
        if self._written and applied:
            self._before, self._now = self._now, self._before
        self._written = False
        if growth != 1.0:
            units = self._before.tensor.view(self._world, -1)[:, self._units :]
            units.view(torch.float32).mul_(growth)

    def forget(self) -> None:
        """Zero again."""
        self._before.tensor.zero_()
        self._written = False

    @property
    def kept(self) -> Tensor:
        """What is kept between windows, as bytes."""
        return self._before.tensor
