"""Dense wire formats: every element travels, in one dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zerort.device import device_for
from zerort.memory import Memory

__all__ = ["Dense"]


class Dense:
    """Gradients cast to `dtype` on the way into the send buffer; sums in fp32, or fp64 for fp64."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, gradients: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
        """One batched copy, which casts where dtypes differ."""
        torch._foreach_copy_(list(slots), list(gradients))

    def decode(self, chunks: Memory, accum: Memory, *, scale: float, add: bool) -> float | Tensor:
        """The sum over ranks, as the device takes it."""
        world = chunks.tensor.numel() // accum.tensor.numel() if accum.tensor.numel() else 1
        device = device_for(accum.tensor.device)
        return device.reduce(chunks, accum, world=world, scale=scale, add=add)

    def round(self, total: Memory, out: Memory) -> float | Tensor:
        """A cast."""
        out.tensor.copy_(total.tensor)
        return device_for(out.tensor.device).squared_norm(out)
