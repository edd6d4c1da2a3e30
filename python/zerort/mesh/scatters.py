"""Memory that collectives of one group use, where it is this rank's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zerort.mesh.comm import GatherMemory, Piece, Scatter, Work

__all__ = ["GatherInPlace", "OwnMemory"]


class _Reduces(Protocol):
    """What of a communicator is needed here."""

    rank: int
    world: int
    device: torch.device

    def pieces(self, *, adds: bool) -> int: ...

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work: ...

    def gather_memory(self, nbytes: int) -> GatherMemory: ...


class OwnMemory:
    """Enough for the largest of `pieces`, touched. It is used again and again."""

    def __init__(self, comm: _Reduces, pieces: Sequence[Piece]) -> None:
        self._comm = comm
        self._send = self._zeros(max(comm.world * piece.nbytes for piece in pieces))
        self._recv = self._zeros(max(self._arriving(piece) * piece.nbytes for piece in pieces))

    def scatters(self, piece: Piece) -> Sequence[Scatter]:
        """One: where the sum happens on the way it arrives in place, on this rank's slice of what
        was sent.
        """
        comm, count = self._comm, self._comm.pieces(adds=piece.adds)
        send = _typed(self._send, comm.world * piece.length, piece.dtype)
        if self._arriving(piece):
            recv = _typed(self._recv, count * piece.length, piece.dtype)
        else:
            recv = send.narrow(0, comm.rank * piece.length, piece.length)
        return [_Own(send, recv, count, piece.length, comm.reduce_scatter)]

    def turn(self) -> int:
        """There is one."""
        return 0

    def gathers(self, nbytes: int) -> GatherMemory:
        """As for any."""
        return self._comm.gather_memory(nbytes)

    def _arriving(self, piece: Piece) -> int:
        """How many pieces arrive beside what is sent."""
        count = self._comm.pieces(adds=piece.adds)
        return count if count > 1 else 0

    def _zeros(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._comm.device).zero_()


@dataclass(frozen=True)
class _Own:
    send: Tensor
    recv: Tensor
    pieces: int
    stride: int
    reduce_scatter: Callable[[Tensor, Tensor], Work]

    def make(self, *, lost: bool) -> Work:
        """Through the library."""
        return self.reduce_scatter(self.recv, self.send)


class _AllGathers(Protocol):
    """What of a communicator is needed here."""

    def all_gather(self, buffer: Tensor) -> Work: ...


class GatherInPlace:
    """No memory: the library reads and writes the buffer itself."""

    def __init__(self, comm: _AllGathers) -> None:
        self._comm = comm

    def make(self, buffer: Tensor, *, lost: bool) -> Work:
        """Through the library."""
        return self._comm.all_gather(buffer)


def _typed(memory: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return memory.narrow(0, 0, length * dtype.itemsize).view(dtype)
