"""fp32 memory in which the encoders of one engine work.

What it guarantees: on a CPU it is as long as the longest that was reserved, and touched once. On an
accelerator it is the caching allocator's, for each use, because encoders work on streams of their
own. What it does not do: it serves one encoder at a time.
"""

from __future__ import annotations

import torch

from zerort.device import device_for
from zerort.memory import Memory

__all__ = ["Scratch"]


class Scratch:
    """Of one engine."""

    def __init__(self) -> None:
        self._longest = 0
        self._memory: Memory | None = None
        self._parts: dict[int, Memory] = {}

    def reserve(self, numel: int) -> None:
        """So much will be taken."""
        if numel > self._longest:
            self._longest, self._memory = numel, None
            self._parts.clear()

    def take(self, numel: int, device: torch.device) -> Memory:
        """(numel,) of what is reserved, with what the last user has left there."""
        if not device_for(device).blocks:
            return Memory.of(torch.empty(numel, dtype=torch.float32, device=device))
        if self._memory is None:
            self._memory = Memory.zeros(self._longest, torch.float32, device)
        if numel not in self._parts:
            self._parts[numel] = self._memory.typed(torch.float32, 0, numel)
        return self._parts[numel]
