"""A flat piece of memory as torch's tensor and as the core's buffer, over the same bytes.

The core alone decides where something lies in it; a view by DLPack is made over each piece without
a copy, and has a storage of its own. What it does not do: it does not know what lies there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.device import Host, Mark
from zerort.memory.moved import Carrier

__all__ = ["Memory", "Side"]


class Side(NamedTuple):
    """Flat memory (n,) of the device's, or of the host's beside a device."""

    tensor: Tensor
    host: Host | None = None

    def part(self, start: int, length: int) -> Side:
        """Elements of it."""
        return Side(self.tensor.narrow(0, start, length), self.host)

    def copy_(self, source: Side) -> Mark | None:
        """Becomes what `source` is cast to, which is in another place; returns the moment behind
        that, until which `source` has to stay as it is.
        """
        cast = source.tensor.to(self.tensor.dtype)
        if self.host is not None:
            return self.host.receive(self.tensor, cast)
        assert source.host is not None
        mark = source.host.send(self.tensor, cast)
        if cast is not source.tensor:
            mark.wait()  # nobody else keeps it
        return mark


class Memory:
    """A flat piece of memory as both sides see it: torch's tensor and the core's buffer, over the
    same bytes.
    """

    __slots__ = ("_over", "_shards", "buffer", "tensor")

    def __init__(
        self,
        tensor: Tensor,
        buffer: _core.Buffer,
        over: Callable[[Tensor], _core.Buffer] = _core.Buffer,
    ) -> None:
        self.tensor = tensor
        self.buffer = buffer
        self._over = over
        self._shards: list[tuple[int, Memory]] = []

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        """Over a tensor's memory (numel,), contiguous."""
        return cls(tensor, _core.Buffer(tensor))

    @classmethod
    def zeros(cls, numel: int, dtype: torch.dtype, device: torch.device) -> Memory:
        """Fresh memory (numel,), touched: a page's first touch costs more than all its later use in
        a step.
        """
        return cls.of(torch.empty(numel, dtype=dtype, device=device).zero_())

    @classmethod
    def of_bucket(
        cls, plan: _core.Plan, bucket: _core.Bucket, dtype: torch.dtype, device: torch.device
    ) -> Memory:
        """Fresh memory for a whole bucket, which knows the bucket's shards and fragments."""
        tensor = torch.empty(bucket.numel, dtype=dtype, device=device).zero_()

        def over(tensor: Tensor) -> _core.Buffer:
            return _core.Buffer(tensor, plan, bucket.id)

        return cls(tensor, over(tensor), over)

    @classmethod
    def over(cls, buffer: _core.Buffer) -> Memory:
        """The tensor over a buffer that the core handed out."""
        return cls(from_dlpack(buffer), buffer)

    def shard(self, rank: int) -> Memory:
        """One rank's slice of a bucket's memory; it follows where that moves."""
        shard = Memory.over(self.buffer.shard(rank))
        self._shards.append((rank, shard))
        return shard

    def move(self, carry: Carrier) -> None:
        """From now on this is what `carry` brings, and so are its shards. What else was made of the
        old memory keeps that.
        """
        self.tensor = carry(self.tensor)
        self.buffer = self._over(self.tensor)
        for rank, shard in self._shards:
            shard.buffer = self.buffer.shard(rank)
            shard.tensor = from_dlpack(shard.buffer)

    def typed(self, dtype: torch.dtype, start: int, length: int) -> Memory:
        """Elements start..start+length of these bytes, read as `dtype`."""
        return Memory.of(self.tensor.view(dtype).narrow(0, start, length))
