"""A wire format that no row of the package is like: bytes, a scale for each block, error feedback.

It proves the contract: elements are packed, so nothing outside may count in elements of a dtype; a
network cannot add them; encoders keep state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zerort import _core
from zerort.memory import Memory
from zerort.wire import Buffers, Extent, Kept, Terms

BLOCK = 128


@dataclass(frozen=True)
class Int8:
    """A byte an element and an fp32 scale a block; what rounding loses is added to the next
    gradient where there is `feedback`.
    """

    feedback: bool = True
    dtype = None
    adds = False

    def shard_bytes(self, numel: int) -> int:
        return numel + numel // BLOCK * 4

    def kept_bytes(self, shard: int, world: int, *, gathers: bool) -> int:
        return 8 * (shard * world + shard) * self.feedback

    def suits(self, shape: Sequence[int], *, embeds: bool) -> bool:
        return True

    def encoder(self, extent: Extent, terms: Terms) -> Int8Encoder:
        return Int8Encoder(self, extent, terms)


class Int8Encoder:
    rounds = True
    slots: Sequence[Tensor] = ()

    def __init__(self, wire: Int8, extent: Extent, terms: Terms) -> None:
        numel, self._shard = extent.numel, extent.shard_numel
        self._bytes = wire.shard_bytes(self._shard)
        self._predivide = terms.predivide
        self._staged = torch.zeros(numel)
        self._views = extent.slots(self._staged)
        self.gradients = Residual(numel, wire.feedback)
        self.sums = Residual(self._shard, wire.feedback)

    def bind(self, buffers: Buffers) -> None:
        assert buffers.send.tensor.dtype == torch.uint8
        self._buffers = buffers

    def release(self) -> None:
        del self._buffers

    def encode(self, gradients: Sequence[Tensor | None]) -> None:
        self._staged.zero_()
        came = [(v, g) for v, g in zip(self._views, gradients, strict=True) if g is not None]
        if came:
            torch._foreach_copy_([view for view, _ in came], [gradient for _, gradient in came])
        self.encode_flat(self._staged)

    def encode_flat(self, gradient: Tensor) -> None:
        wanted = self.gradients.on_top_of(gradient / self._predivide)
        pieces = self._buffers.send.tensor.split(self._bytes)
        for values, piece in zip(wanted.split(self._shard), pieces, strict=True):
            write(values, piece)
        self.gradients.lost(wanted, torch.cat([read(piece) for piece in pieces]))

    def clear(self) -> None:
        self._buffers.send.tensor.zero_()

    def decode(self, accum: Memory, *, scale: float, add: bool) -> float:
        first, *rest = map(read, map(self._arrived, range(self._buffers.pieces)))
        total = sum(rest, start=first) * (scale * self._predivide)
        accum.tensor.copy_(accum.tensor + total if add else total)
        return _core.squared_norm(accum.buffer)

    def piece(self, source: int) -> _core.Buffer:
        return _core.Buffer(read(self._arrived(source)))

    def _arrived(self, source: int) -> Tensor:
        buffers = self._buffers
        return buffers.recv.tensor.narrow(0, source * buffers.stride, self._bytes)

    def round(self, total: Memory) -> float:
        wanted = self.sums.on_top_of(total.tensor.float())
        write(wanted, self._buffers.own.tensor)
        got = read(self._buffers.own.tensor)
        self.sums.lost(wanted, got)
        return _core.squared_norm(_core.Buffer(got))

    def spread(self, accum: Memory) -> None:
        accum.tensor.copy_(torch.cat([*map(read, self._buffers.send.tensor.split(self._bytes))]))

    def close(self, *, applied: bool, growth: float) -> None:
        self.gradients.close(applied, growth)
        self.sums.close(applied, growth)

    def forget(self) -> None:
        self.gradients.forget()
        self.sums.forget()

    def kept(self) -> Kept:
        return Kept()

    def restore(self, kept: Kept) -> None:
        pass


class Residual:
    """What rounding has lost so far; zeros for ever without feedback."""

    def __init__(self, numel: int, feedback: bool) -> None:
        self._feedback = feedback
        self.now = torch.zeros(numel)
        self._before = torch.zeros(numel)

    def on_top_of(self, values: Tensor) -> Tensor:
        return values + self.now

    def lost(self, wanted: Tensor, got: Tensor) -> None:
        if self._feedback:
            self.now = torch.nan_to_num(wanted - got, 0.0, 0.0, 0.0)

    def close(self, applied: bool, growth: float) -> None:
        self.now = (self.now if applied else self._before) * growth
        self._before = self.now

    def forget(self) -> None:
        self.now = self._before = torch.zeros_like(self.now)


def write(values: Tensor, piece: Tensor) -> None:
    """Encodes `values` (n,) into `piece` of bytes."""
    blocks = values.view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / torch.where(scales == 0, 1.0, scales)).round()
    # a block that is not finite says which of its elements are not
    codes = torch.where(scales.isfinite(), codes, (~blocks.isfinite()).float())
    numel = values.numel()
    piece[:numel].view(torch.int8).copy_(codes.flatten())
    piece[numel:].view(torch.float32).copy_(scales.flatten())


def read(piece: Tensor) -> Tensor:
    """What `piece` says, in fp32 (n,)."""
    numel = piece.numel() * BLOCK // (BLOCK + 4)
    codes = piece[:numel].view(torch.int8).float().view(-1, BLOCK)
    scales = piece[numel:].view(torch.float32).unsqueeze(1)
    return torch.where(codes == 0, 0.0, codes * scales).flatten()
