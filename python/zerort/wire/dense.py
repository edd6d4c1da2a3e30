"""Dense wire formats: every element is sent, in one dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zerort import _core
from zerort.device import device_for
from zerort.memory import Memory
from zerort.wire.contract import Buffers, Extent, Kept, Terms

__all__ = ["Dense"]


class Dense:
    """Gradients in `dtype`, which a network may add; sums in fp32, or fp64 for fp64."""

    adds = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def shard_bytes(self, numel: int) -> int:
        """Every element in `dtype`."""
        return numel * self.dtype.itemsize

    def kept_bytes(self, shard: int, world: int, *, gathers: bool) -> int:
        """None."""
        return 0

    def suits(self, shape: Sequence[int], *, embeds: bool) -> bool:
        """Any."""
        return True

    def encoder(self, extent: Extent, terms: Terms) -> DenseEncoder:
        """Keeps no state."""
        return DenseEncoder(self.dtype, extent, terms)


class DenseEncoder:
    """Casts gradients on their way into the send buffer, in one batch."""

    def __init__(self, dtype: torch.dtype, extent: Extent, terms: Terms) -> None:
        bucket = extent.bucket
        self.rounds = dtype.itemsize < bucket.accum.tensor.itemsize
        self._shard = extent.shard_numel
        self._predivide = terms.predivide
        self._device = device_for(bucket.values.tensor.device)

    @property
    def slots(self) -> Sequence[Tensor]:
        """The parameters' places in the send buffer, where nothing else writes there."""
        return self._buffers.slots if self._buffers.rests else []

    def bind(self, buffers: Buffers) -> None:
        """What is sent is a gradient as it is, so that nothing has to be made."""
        self._buffers = buffers

    def release(self) -> None:
        """All that it has."""
        self.__dict__.pop("_buffers", None)

    def encode(self, gradients: Sequence[Tensor | None]) -> None:
        """One batched copy, which casts where dtypes differ."""
        if self._buffers.shared:
            self._buffers.send.tensor.zero_()  # others wrote where this bucket has padding
        pairs = zip(gradients, self._buffers.slots, strict=True)
        moving = [(g, slot) for g, slot in pairs if g is not slot]
        came = [g for g, _ in moving if g is not None]
        slots = [slot for _, slot in moving]
        if len(came) < len(moving):
            torch._foreach_zero_([slot for g, slot in moving if g is None])
            slots = [slot for g, slot in moving if g is not None]
        if came:
            torch._foreach_copy_(slots, came)
        if self._predivide != 1.0:
            self._buffers.send.tensor.div_(self._predivide)

    def encode_flat(self, gradient: Tensor) -> None:
        """A cast."""
        self._buffers.send.tensor.copy_(gradient)
        if self._predivide != 1.0:
            self._buffers.send.tensor.div_(self._predivide)

    def clear(self) -> None:
        """Zeros."""
        self._buffers.send.tensor.zero_()

    def decode(self, accum: Memory, *, scale: float, add: bool) -> float | Tensor:
        """The sum over ranks, as the device takes it."""
        buffers = self._buffers
        scale *= self._predivide
        return self._device.reduce(
            buffers.recv, accum, world=buffers.pieces, stride=buffers.stride, scale=scale, add=add
        )

    def piece(self, source: int) -> _core.Buffer:
        """A slice."""
        return self._buffers.recv.buffer.slice(source * self._buffers.stride, self._shard)

    def round(self, total: Memory) -> float | Tensor:
        """A cast."""
        own = self._buffers.own
        own.tensor.copy_(total.tensor)
        return self._device.squared_norm(own)

    def spread(self, accum: Memory) -> None:
        """A cast."""
        accum.tensor.copy_(self._buffers.send.tensor)

    def close(self, *, applied: bool, growth: float) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """Nothing is kept."""

    def kept(self) -> Kept:
        """Nothing."""
        return Kept()

    def restore(self, kept: Kept) -> None:
        """Nothing is kept."""
