"""Dense wire formats: every element travels, in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zerort import _core
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
        """The sum over ranks; on CPU one fused pass in the core."""
        world = chunks.tensor.numel() // accum.tensor.numel() if accum.tensor.numel() else 1
        return _FOLDS[accum.tensor.device.type](chunks, accum, world, scale, add)

    def round(self, total: Memory, out: Memory) -> float | Tensor:
        """A cast."""
        out.tensor.copy_(total.tensor)
        return _NORMS[out.tensor.device.type](out)


def _fold_in_core(
    chunks: Memory, accum: Memory, world: int, scale: float, add: bool
) -> float | Tensor:
    if accum.tensor.dtype in (torch.float32, torch.float64):
        return _core.reduce(chunks.buffer, accum.buffer, world=world, scale=scale, add=add)
    # Sums are taken in fp32 all the same; only what is kept between passes is narrower.
    exact = Memory.zeros(accum.tensor.numel(), torch.float32, accum.tensor.device)
    _core.reduce(chunks.buffer, exact.buffer, world=world, scale=scale, add=False)
    accum.tensor.copy_(exact.tensor + accum.tensor if add else exact.tensor)
    return _norm_in_core(accum)


def _norm_in_core(memory: Memory) -> float:
    return _core.squared_norm(memory.buffer)


def _fold_in_torch(
    chunks: Memory, accum: Memory, world: int, scale: float, add: bool
) -> float | Tensor:
    precise = torch.promote_types(accum.tensor.dtype, torch.float32)
    total, *rest = (piece.to(precise) for piece in chunks.tensor.chunk(world))
    for piece in rest:
        total = total + piece
    if add:
        accum.tensor.add_(total, alpha=scale)
    else:
        accum.tensor.copy_(total * scale)
    return _norm_in_torch(accum)


def _norm_in_torch(memory: Memory) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(memory.tensor, dtype=torch.float64)
    return norm.square()


_FOLDS = {"cpu": _fold_in_core, "cuda": _fold_in_torch}
_NORMS: dict[str, Callable[[Memory], float | Tensor]] = {
    "cpu": _norm_in_core,
    "cuda": _norm_in_torch,
}
