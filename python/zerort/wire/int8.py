"""A byte an element, and an fp32 scale for each 256 elements: a quarter of fp32 and a 64th more.

Elements are rounded to the nearest of 255 steps up to their group's largest. What that leaves out
is added to the next gradient where there is *feedback*, so that what is small beside its group is
learnt all the same, only later. Without, rounding is random, so that the expectation is the
gradient: by numbers that are a function of rank, bucket and step, and the same in a run that is
repeated. A network cannot add such bytes, so pieces are exchanged and added up in fp32 where they
arrive. At stage 0 finished sums are rounded the same way, by the rank whose shard they are, so that
all ranks read the same.

A group with an infinity or NaN arrives as one: which elements they are is kept, and the finite ones
beside them are not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from zerort import _core
from zerort.device import GROUP, Rounding, device_for, residual_bytes
from zerort.memory import Memory
from zerort.wire.contract import Buffers, Extent, Kept, Terms
from zerort.wire.residual import Residual

__all__ = ["Int8"]

_SMALL_EMBEDDING = 2**16


class Int8:
    """Pieces of bytes: the codes of a shard, then the scales of its groups."""

    dtype = None
    adds = False

    def shard_bytes(self, numel: int) -> int:
        """A byte an element, and 4 a group."""
        return numel + 4 * -(-numel // GROUP)

    def kept_bytes(self, shard: int, world: int, *, gathers: bool) -> int:
        """Two residuals of 2 bytes an element of the whole bucket, and where sums are gathered of a
        shard of them.
        """
        return 2 * (residual_bytes(shard, world) + (residual_bytes(shard, 1) if gathers else 0))

    def suits(self, shape: Sequence[int], *, embeds: bool) -> bool:
        """Not vectors and scalars, and no small embedding: they are few, and their elements differ
        too much to share a scale.
        """
        return len(shape) > 1 and not (embeds and torch.Size(shape).numel() < _SMALL_EMBEDDING)

    def encoder(self, extent: Extent, terms: Terms) -> Int8Encoder:
        """Keeps residuals where there is feedback."""
        return Int8Encoder(self, extent, terms)


@dataclass
class Turn:
    """How often something has been rounded at random: windows that were applied, and roundings of
    the one under way.
    """

    windows: int = 0
    roundings: int = 0

    def seed(self, rank: int, bucket: int) -> int:
        """Of the next one."""
        self.roundings += 1
        where = struct.pack("<4q", rank, bucket, self.windows, self.roundings)
        return int.from_bytes(blake2b(where, digest_size=8).digest(), "little")

    def close(self, *, applied: bool) -> None:
        """The window is over; one that was dropped has left no trace."""
        self.windows += applied
        self.roundings = 0


class Int8Encoder:
    """Gathers gradients in fp32, beside which each kernel goes once over a bucket."""

    rounds = True
    slots: Sequence[Tensor] = ()

    def __init__(self, wire: Int8, extent: Extent, terms: Terms) -> None:
        self._extent, self._terms = extent, terms
        bucket = extent.bucket
        self._shard = extent.shard_numel
        self._piece = wire.shard_bytes(self._shard)
        device = self._place = bucket.values.tensor.device
        self._device = device_for(device)
        self._turn = Turn()
        self._gradients = self._sums = None
        if terms.feedback:
            self._gradients = Residual(self._shard, extent.world, device)
            gathers = any(hop.op == "all_gather" for hop in bucket.spec.reduce_hops)
            self._sums = Residual(self._shard, 1, device) if gathers else None
        self._views: tuple[Tensor, list[Tensor], list[Tensor]] | None = None
        terms.scratch.reserve(extent.numel)

    def bind(self, buffers: Buffers) -> None:
        """Kernels find their way in bytes, so that nothing has to be made."""
        self._buffers = buffers

    def release(self) -> None:
        """The views of what gradients are gathered in go too."""
        self.__dict__.pop("_buffers", None)
        self._views = None

    def encode(self, gradients: Sequence[Tensor | None]) -> None:
        """One batched copy, which casts, and one pass over it."""
        staged = self._terms.scratch.take(self._extent.numel, self._place)
        views, gaps = self._cut(staged.tensor)
        pairs = list(zip(gradients, views, strict=True))
        empty = [*gaps, *(view for gradient, view in pairs if gradient is None)]
        came = [(gradient, view) for gradient, view in pairs if gradient is not None]
        if empty:
            torch._foreach_zero_(empty)
        if came:
            torch._foreach_copy_([view for _, view in came], [gradient for gradient, _ in came])
        self._quantize(staged)

    def encode_flat(self, gradient: Tensor) -> None:
        """One pass, where it is fp32."""
        if gradient.dtype == torch.float32:
            self._quantize(Memory.of(gradient))
            return
        staged = self._terms.scratch.take(self._extent.numel, self._place)
        staged.tensor.copy_(gradient)
        self._quantize(staged)

    def clear(self) -> None:
        """Codes and scales of zero."""
        self._buffers.send.tensor.zero_()

    def decode(self, accum: Memory, *, scale: float, add: bool) -> float | Tensor:
        """In fp32, in rank order."""
        buffers = self._buffers
        scale *= self._terms.predivide
        return self._device.sum_quantized(
            buffers.recv, accum, world=buffers.pieces, stride=buffers.stride, scale=scale, add=add
        )

    def piece(self, source: int) -> _core.Buffer:
        """Read into memory of its own."""
        sent = self._buffers.recv.tensor.narrow(0, source * self._buffers.stride, self._piece)
        found = Memory.zeros(self._shard, torch.float32, self._place)
        self._device.dequantize(Memory.of(sent), found, world=1)
        return found.buffer

    def round(self, total: Memory) -> float | Tensor:
        """As gradients are, with what this rank's sums have lost so far."""
        own, staged = self._buffers.own, self._terms.scratch.take(self._shard, self._place)
        staged.tensor.copy_(total.tensor)
        rounding = self._rounding(self._sums)
        self._device.quantize(staged, own, world=1, scale=1.0, rounding=rounding)
        self._device.dequantize(own, staged, world=1)
        return self._device.squared_norm(staged)

    def spread(self, accum: Memory) -> None:
        """All ranks' pieces."""
        self._device.dequantize(self._buffers.send, accum, world=self._extent.world)

    def close(self, *, applied: bool, growth: float) -> None:
        """Residuals are those of windows that were applied."""
        self._turn.close(applied=applied)
        for residual in self._residuals.values():
            residual.close(applied=applied, growth=growth)

    def forget(self) -> None:
        """Nothing has been left out."""
        self._turn = Turn()
        for residual in self._residuals.values():
            residual.forget()

    def kept(self) -> Kept:
        """Residuals, or how far random rounding has come."""
        residuals = {name: residual.kept for name, residual in self._residuals.items()}
        return Kept(0 if residuals else self._turn.windows, residuals)

    def restore(self, kept: Kept) -> None:
        """By a copy."""
        self._turn = Turn(kept.windows)
        for name, residual in kept.residuals.items():
            self._residuals[name].kept.copy_(residual)

    @property
    def _residuals(self) -> dict[str, Residual]:
        named = {"gradients": self._gradients, "sums": self._sums}
        return {name: residual for name, residual in named.items() if residual is not None}

    def _quantize(self, values: Memory) -> None:
        self._device.quantize(
            values,
            self._buffers.send,
            world=self._extent.world,
            scale=1.0 / self._terms.predivide,
            rounding=self._rounding(self._gradients),
        )

    def _rounding(self, residual: Residual | None) -> Rounding:
        if residual is None:
            return Rounding(seed=self._turn.seed(self._terms.rank, self._extent.bucket.spec.id))
        before, after = residual.turn()
        return Rounding(before=before, after=after)

    def _cut(self, staged: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of each parameter's place, and of what lies between them."""
        if self._views is None or self._views[0] is not staged:
            gaps = _gaps(self._extent.bucket.spec, staged)
            self._views = staged, self._extent.slots(staged), gaps
        return self._views[1:]


def _gaps(spec: _core.Bucket, staged: Tensor) -> list[Tensor]:
    places = sorted(zip(spec.offsets, spec.numels, strict=True))
    ends = [0, *(start + length for start, length in places)]
    starts = [*(start for start, _ in places), spec.numel]
    spans = zip(ends, starts, strict=True)
    return [staged.narrow(0, end, start - end) for end, start in spans if start > end]
