"""One process: the null communicator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.comm import Work

__all__ = ["LocalComm"]


class LocalComm:
    """One process: the null communicator, which satisfies the same contract."""

    rank, world, chunks = 0, 1, 1
    window: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Nothing to move: `recv` is `send`."""
        return Work()

    def all_gather(self, buffer: Tensor) -> Work:
        """Nothing to move."""
        return Work()

    def all_reduce(self, values: Tensor) -> None:
        """The sum over one rank."""

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Nothing to move."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]

    def failure(self, what: str, error: Exception) -> CommError:
        """One process has no peers to name."""
        return CommError(f"{what} failed: {error}")

    def close(self) -> None:
        """Nothing to give back."""
