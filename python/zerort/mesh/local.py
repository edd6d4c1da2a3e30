"""One rank alone: the null communicator and the null control group, of the same contracts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.comm import GatherMemory, Piece, ScatterMemory, Work
from zerort.mesh.scatters import GatherInPlace, OwnMemory

__all__ = ["LocalComm", "LocalControl"]


class LocalControl:
    """There is no peer."""

    rank, world = 0, 1
    name = ""
    idle: Callable[[], None] | None = None

    def all_reduce(self, values: Tensor) -> None:
        """The sum over one rank."""

    def broadcast(self, values: Tensor, source: int = 0) -> None:
        """Nothing to move."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]

    def failure(self, what: str, error: Exception) -> CommError:
        """One rank has no peers to name."""
        return CommError(f"{what} failed: {error}")

    def set_timeout(self, timeout: timedelta) -> None:
        """There is no peer to wait for."""

    def close(self, *, waits: bool = True) -> None:
        """Nothing to give back."""


class LocalComm:
    """A group of one rank, which the job numbers `job_rank`."""

    rank, world = 0, 1
    window: int | None = None
    failed = False

    def __init__(self, device: torch.device, job_rank: int = 0) -> None:
        self.device = device
        self.ranks: tuple[int, ...] = (job_rank,)
        self.control = LocalControl()

    def pieces(self, *, adds: bool) -> int:
        """What it sent."""
        return 1

    def scatter_memory(self, pieces: Sequence[Piece]) -> ScatterMemory:
        """Its own."""
        return OwnMemory(self, pieces)

    def gather_memory(self, nbytes: int) -> GatherMemory:
        """None."""
        return GatherInPlace(self)

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Nothing to move: `recv` is `send`."""
        return Work()

    def all_gather(self, buffer: Tensor) -> Work:
        """Nothing to move."""
        return Work()

    def all_to_all(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """Nothing to move: both are empty."""
        return Work()

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Nothing to move."""

    def failure(self, what: str, error: Exception) -> CommError:
        """One rank has no peers to name."""
        return self.control.failure(what, error)

    def close(self, *, waits: bool = True) -> None:
        """Nothing to give back."""
