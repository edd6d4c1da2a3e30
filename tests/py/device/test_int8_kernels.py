"""The wire of bytes has two implementations, the core's kernels and torch's: the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zerort import _core
from zerort.device import GROUP, quantize, residual_bytes
from zerort.errors import LayoutError

LINE = 128
SHARDS = [LINE, 2 * LINE, 5 * LINE, 17 * LINE]
"""With half a group at the end, and without."""
every_shape = pytest.mark.parametrize("shard", SHARDS)
every_world = pytest.mark.parametrize("world", [1, 3])


def values_of(kind: str, shard: int, world: int) -> Tensor:
    """fp32 (world x shard,)."""
    generator = torch.Generator().manual_seed(shard + world)
    numel = world * shard
    if kind == "bits":
        wide = torch.randint(-(2**31), 2**31, (numel,), generator=generator)
        return wide.to(torch.int32).view(torch.float32)
    values = torch.randn(numel, generator=generator)
    if kind == "sizes":
        return values * torch.exp2(torch.randint(-90, 90, (numel,), generator=generator).float())
    if kind == "tiny":
        return values * 2.0**-100
    if kind == "ties":
        return (values * 4).round() / 2 + torch.where(torch.arange(numel) % GROUP == 0, 63.5, 0.0)
    values[shard // 3] = torch.nan
    values[-1] = -torch.inf
    values[0] = torch.inf
    return values


KINDS = ["bits", "sizes", "tiny", "ties", "nonfinite"]


def bytes_of(numel: int) -> Tensor:
    return torch.full((numel,), 0xEE, dtype=torch.uint8)


def by_core(values: Tensor, world: int, scale: float, **rounding: Any) -> Tensor:
    shard = values.numel() // world
    pieces = bytes_of(world * (shard + 4 * -(-shard // GROUP)))
    cores = {k: _core.Buffer(v) if isinstance(v, Tensor) else v for k, v in rounding.items()}
    _core.quantize(_core.Buffer(values), _core.Buffer(pieces), world=world, scale=scale, **cores)
    return pieces


def by_torch(values: Tensor, world: int, scale: float, **rounding: Any) -> Tensor:
    shard = values.numel() // world
    pieces = bytes_of(world * (shard + 4 * -(-shard // GROUP)))
    quantize.quantize(values, pieces, world=world, scale=scale, **rounding)
    return pieces


def alike(one: Tensor, other: Tensor, shard: int) -> bool:
    """To the bit, but for the payload of a NaN among the scales."""
    codes, scales = zip(
        *(
            quantize._cut(p, p.numel() // (shard + 4 * -(-shard // GROUP)), shard, torch.int8)
            for p in (one, other)
        ),
        strict=True,
    )
    return torch.equal(*codes) and torch.equal(*(s.nan_to_num(-1.0) for s in scales))


@every_world
@every_shape
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 0x0123_4567_89AB_CDEF])
def test_torch_writes_the_bytes_that_the_core_writes(
    kind: str, shard: int, world: int, seed: int | None
) -> None:
    values = values_of(kind, shard, world)
    for scale in (1.0, 1.0 / 3.0):
        one, other = (by(values.clone(), world, scale, seed=seed) for by in (by_core, by_torch))
        assert alike(one, other, shard)


@every_world
@every_shape
@pytest.mark.parametrize("kind", KINDS)
def test_torch_leaves_the_residual_that_the_core_leaves(kind: str, shard: int, world: int) -> None:
    found = []
    for by in (by_core, by_torch):
        residuals = [torch.zeros(residual_bytes(shard, world), dtype=torch.uint8) for _ in "ab"]
        pieces = []
        for step in range(4):
            values = values_of(kind, shard, world) * (1.0 + step)
            before, after = residuals
            # the third pass of four is the second of its window
            where = {"after": before} if step == 2 else {"before": before, "after": after}
            pieces.append(by(values, world, 0.5, **where))
            if step != 2:
                residuals.reverse()
        found.append((pieces, residuals))
    (ours, kept), (theirs, others) = found
    assert all(alike(one, other, shard) for one, other in zip(ours, theirs, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(kept, others, strict=True))


@every_world
@every_shape
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add", [False, True])
def test_torch_reads_and_sums_what_the_core_does(
    kind: str, shard: int, world: int, add: bool
) -> None:
    pieces = by_core(values_of(kind, shard, world), world, 1.0)
    read = torch.empty(world * shard), torch.empty(world * shard)
    _core.dequantize(_core.Buffer(pieces), _core.Buffer(read[0]), world=world)
    quantize.dequantize(pieces, read[1], world=world)
    torch.testing.assert_close(*read, rtol=0, atol=0, equal_nan=True)
    sums = torch.full((shard,), 0.25), torch.full((shard,), 0.25)
    norm = _core.sum_quantized(
        _core.Buffer(pieces), _core.Buffer(sums[0]), world=world, scale=0.3, add=add
    )
    stride = pieces.numel() // world
    quantize.sum_quantized(pieces, sums[1], world=world, stride=stride, scale=0.3, add=add)
    torch.testing.assert_close(*sums, rtol=0, atol=0, equal_nan=True)
    assert (norm < float("inf")) == bool(sums[0].isfinite().all())


def test_the_core_refuses_memory_that_does_not_fit() -> None:
    values, pieces = torch.zeros(2 * LINE), bytes_of(2 * (LINE + 4))
    with pytest.raises(LayoutError, match="pieces and residuals are uint8"):
        _core.quantize(_core.Buffer(values), _core.Buffer(values.clone()), world=2, scale=1.0)
    with pytest.raises(LayoutError, match="sent as bytes are fp32"):
        _core.dequantize(_core.Buffer(pieces), _core.Buffer(pieces.clone()), world=2)
    with pytest.raises(LayoutError, match="are not 3 chunks"):
        _core.dequantize(_core.Buffer(pieces), _core.Buffer(torch.zeros(3 * LINE)), world=3)
    with pytest.raises(LayoutError, match="has a seed, or a residual"):
        residual = _core.Buffer(bytes_of(residual_bytes(LINE, 2)))
        _core.quantize(
            _core.Buffer(values), _core.Buffer(pieces), world=2, scale=1.0, seed=1, after=residual
        )
    assert bool((pieces == 0xEE).all())
