"""The wire that sends bytes, in torch: what the core's kernels do on a CPU, with the same bytes, on
a device that they do not reach.

Shapes and formats are those of the core's `quantize`. What it does not do: no wait for the device,
and nothing in place but what it is given to write.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GROUP", "dequantize", "quantize", "residual_bytes", "sum_quantized"]

GROUP = 256
"""Elements that share a scale; fewer at the end of a shard."""
_LARGEST = 127.0
_SMALLEST_SCALE = 2.0**-100
_UNITS = 65536.0
_MASK = 0xFFFFFFFF


def residual_bytes(shard: int, world: int) -> int:
    """Of `world` shards with so many elements each."""
    return world * (2 * shard + 4 * -(-shard // GROUP))


def quantize(
    values: Tensor,
    pieces: Tensor,
    *,
    world: int,
    scale: float,
    seed: int | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> None:
    """Writes `values` (world x n,) of fp32, times `scale`, into as many `pieces` of uint8."""
    shard = values.numel() // world
    wanted = values.view(world, shard) * scale
    if after is not None:
        elements, units = _cut(after if before is None else before, world, shard, torch.int16)
        kept = torch.where(units.isfinite(), units, 0.0)
        wanted = wanted + elements.float() * _spread(kept, shard)
    grouped = _grouped(wanted)
    finite = grouped.isfinite().all(2)
    scales = torch.where(finite, grouped.abs().amax(2), torch.nan) / _LARGEST
    scales = torch.where(scales < _SMALLEST_SCALE, 0.0, scales)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    scaled = (wanted * _spread(inverse, shard)).clamp(-_LARGEST, _LARGEST)
    if seed is not None:
        scaled = scaled + _offsets(seed, scaled.numel(), scaled.device).view(world, shard)
    whole = _spread(finite, shard)
    codes = torch.where(whole, scaled.round(), _marks(wanted))
    places, out = _cut(pieces, world, shard, torch.int8)
    places.copy_(codes)
    out.copy_(scales)
    if after is not None:
        # of a group that is not finite nothing is kept
        kept = torch.where(finite, scales, 0.0)
        lost = torch.where(whole, wanted - codes * _spread(kept, shard), 0.0)
        lost = lost * _spread(torch.where(finite, inverse, 0.0) * _UNITS, shard)
        most = 32767.0
        elements, units = _cut(after, world, shard, torch.int16)
        elements.copy_(lost.clamp(-most, most).round())
        units.copy_(kept / _UNITS)


def sum_quantized(
    pieces: Tensor, accum: Tensor, *, world: int, stride: int, scale: float, add: bool
) -> None:
    """Sums the `world` pieces of one shard, `stride` bytes apart, in rank order, in fp32, times
    `scale`, into or onto `accum` (n,).
    """
    shard = accum.numel()
    length = shard + 4 * -(-shard // GROUP)
    total, *rest = (
        _read(pieces.narrow(0, rank * stride, length), 1, shard)[0] for rank in range(world)
    )
    for piece in rest:
        total = total + piece
    total = total * scale
    accum.copy_(accum + total if add else total)


def dequantize(pieces: Tensor, values: Tensor, *, world: int) -> None:
    """Reads `world` pieces into `values` (world x n,)."""
    values.copy_(_read(pieces, world, values.numel() // world).flatten())


def _read(pieces: Tensor, world: int, shard: int) -> Tensor:
    """In fp32 (world, shard)."""
    codes, scales = _cut(pieces, world, shard, torch.int8)
    codes, scales = codes.float(), _spread(scales, shard)
    marked = torch.where(codes.abs() == 1, codes * torch.inf, torch.nan)
    marked = torch.where(codes == 0, 0.0, marked)
    return torch.where(scales.isfinite(), codes * scales, marked)


def _cut(memory: Tensor, world: int, shard: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of a piece's or a residual's elements (world, shard) and of what its groups have
    (world, groups).
    """
    rows = memory.view(world, -1)
    length = shard * dtype.itemsize
    return rows[:, :length].view(dtype), rows[:, length:].view(torch.float32)


def _grouped(values: Tensor) -> Tensor:
    """(world, groups, 256), with zeros behind the end of a shard."""
    world, shard = values.shape
    short = -shard % GROUP
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    return padded.view(world, -1, GROUP)


def _spread(of_groups: Tensor, shard: int) -> Tensor:
    """What a group has for each of its elements (world, shard)."""
    return of_groups.repeat_interleave(GROUP, 1, output_size=of_groups.shape[1] * GROUP)[:, :shard]


def _marks(wanted: Tensor) -> Tensor:
    marks = torch.where(wanted.isnan(), 2.0, wanted.sign())
    return torch.where(wanted.isfinite(), 0.0, marks)


def _offsets(seed: int, numel: int, device: torch.device) -> Tensor:
    """Between -1/2 and 1/2, by an element's index, as the core draws them."""
    low, high = seed & _MASK, seed >> 32
    drawn = torch.arange(numel, dtype=torch.int64, device=device) & _MASK ^ low
    drawn = _times(drawn ^ drawn >> 16, 0x7FEB352D)
    drawn = _times(drawn ^ drawn >> 15 ^ high, 0x846CA68B)
    drawn = (drawn ^ drawn >> 16) >> 16
    return drawn.float() * 2.0**-16 + (2.0**-17 - 0.5)


def _times(values: Tensor, factor: int) -> Tensor:
    """Of 32 bits, modulo 2 to the 32; in two halves, for 64 bits have a sign."""
    high = ((values >> 16) * factor & 0xFFFF) << 16
    return (values & 0xFFFF) * factor + high & _MASK
