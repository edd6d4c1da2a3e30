"""Everyone starts from rank 0's values.

Buckets go as they are. What lies in none, frozen parameters and buffers of any dtype, goes as
bytes, because a communication library sums few dtypes and refuses the others even where nothing is
summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zerort.errors import PlanError
from zerort.memory import FlatModel
from zerort.mesh import Comm
from zerort.start import agreed

__all__ = ["broadcast", "loose"]


def loose(model: nn.Module, params: Sequence[nn.Parameter]) -> list[tuple[str, Tensor]]:
    """What lies in no bucket, by name: parameters but `params`, and buffers."""
    planned = {id(parameter) for parameter in params}
    return sorted(
        ((name, tensor) for name, tensor in _named(model) if id(tensor) not in planned),
        key=lambda named: named[0],
    )


def broadcast(comm: Comm, model: nn.Module, flat: FlatModel) -> None:
    """Brings rank 0's values to all ranks, whose loose tensors are alike.

    Raises `PlanError` naming one that has no bytes to send, `CommError`.
    """
    pieces = agreed(comm.control, lambda: [Piece.of(*named) for named in loose(model, flat.params)])
    with torch.no_grad():
        for bucket in flat.buckets:
            if not bucket.is_adopted:
                agreed(comm.control, bucket.adopt)
            if not bucket.is_common:
                comm.broadcast(bucket.values.tensor)
            bucket.keep()
            bucket.free()
        for piece in pieces:
            if piece.sent.numel():
                comm.broadcast(piece.sent)
        agreed(comm.control, lambda: _write(pieces))


@dataclass(frozen=True)
class Piece:
    """A tensor's values in one piece, and where they belong."""

    values: Tensor
    dense: Tensor
    """The same memory where that is in one piece, else a copy."""
    sent: Tensor
    """Its bytes (numel,)."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Piece:
        """Raises `PlanError` where the values are not an array in memory."""
        values = _without_repeats(tensor.detach())
        try:
            dense = values.resolve_conj().resolve_neg().contiguous()
            return cls(values, dense, dense.view(-1).view(torch.uint8))
        except (RuntimeError, TypeError) as error:
            raise PlanError(
                f"{name}, a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout}, cannot "
                f"be sent from rank 0 to the others, because its values are no plain array: {error}"
            ) from error


def _write(pieces: Sequence[Piece]) -> None:
    """Puts back what was sent."""
    for piece in pieces:
        if piece.dense.data_ptr() != piece.values.data_ptr():
            piece.values.copy_(piece.dense)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _without_repeats(tensor: Tensor) -> Tensor:
    """Each element of memory once: an expanded tensor refuses to be written to."""
    if tensor.layout is torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor
