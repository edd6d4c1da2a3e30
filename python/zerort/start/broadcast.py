"""Everyone starts from rank 0's values.

Buckets go as they are. What lies in none, frozen parameters and buffers of any dtype, goes as
bytes, because a communication library sums few dtypes and refuses the others even where nothing is
summed. Many small tensors make one message: they are copied together into memory of at most `ROOM`
bytes, message after message; one that is as large goes from where it is.
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

__all__ = ["ROOM", "broadcast", "loose"]

ROOM = 25 * 2**20
"""Bytes of a message of small tensors: as much as a bucket has where nothing is configured."""


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
        send = messages([piece.sent for piece in pieces])
        room = agreed(comm.control, lambda: _room_for(send, comm.device))
        for message in send:
            _send(comm, message, room)
        agreed(comm.control, lambda: _write(pieces))


@dataclass(frozen=True)
class Piece:
    """A tensor's values in one piece, and where they belong."""

    values: Tensor
    dense: Tensor
    """The same memory where that is in one piece, else a copy; alike on ranks whose tensors are."""
    sent: Tensor
    """Its bytes (nbytes,)."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Piece:
        """Raises `PlanError` where the values are not an array in memory."""
        values = tensor.detach()
        try:
            dense = values.resolve_conj().resolve_neg().contiguous()
            return cls(values, dense, dense.view(-1).view(torch.uint8))
        except (RuntimeError, TypeError) as error:
            raise PlanError(
                f"{name}, a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout}, cannot "
                f"be sent from rank 0 to the others, because its values are no plain array: {error}"
            ) from error


def messages(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Bytes (nbytes,) that go together, in their order: as many as have room, or one that has none.
    A tensor without elements is in no message.
    """
    found: list[list[Tensor]] = []
    left = 0
    for tensor in tensors:
        if not tensor.numel():
            continue
        if tensor.numel() > left:
            found.append([])
            left = ROOM
        found[-1].append(tensor)
        left -= tensor.numel()
    return found


def _room_for(send: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Memory for the largest message of several tensors."""
    sizes = [sum(map(Tensor.numel, message)) for message in send if len(message) > 1]
    return torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)


def _send(comm: Comm, message: list[Tensor], room: Tensor) -> None:
    """Rank 0's bytes are everybody's."""
    if len(message) == 1:
        comm.broadcast(message[0])
        return
    together = room.narrow(0, 0, sum(map(Tensor.numel, message)))
    parts = list(torch.split(together, [tensor.numel() for tensor in message]))
    if comm.rank == 0:
        torch._foreach_copy_(parts, message)
    comm.broadcast(together)
    if comm.rank != 0:
        torch._foreach_copy_(message, parts)


def _write(pieces: Sequence[Piece]) -> None:
    """Puts back what was sent."""
    for piece in pieces:
        if piece.dense.data_ptr() != piece.values.data_ptr():
            once, sent = _without_repeats(piece.values, piece.dense)
            once.copy_(sent)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _without_repeats(tensor: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Each element of memory once, for an expanded tensor refuses to be written to, and the same
    elements of `like`.
    """
    if tensor.layout is torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor, like = tensor.narrow(dim, 0, 1), like.narrow(dim, 0, 1)
    return tensor, like
