"""Buffers between ranks: what the communicators over torch.distributed have alike."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.comm import GatherMemory, Piece, ScatterMemory, Work
from zerort.mesh.control import GlooControl
from zerort.mesh.groups import Call, Groups
from zerort.mesh.scatters import GatherInPlace, OwnMemory

__all__ = ["Call", "GroupComm", "exchange"]


class GroupComm:
    """Buffers over groups of its own, small facts over `control`, among the same ranks.

    `gradients` and `parameters` name the groups that carry them; they may be the same.
    """

    gradients: str
    parameters: str

    def __init__(
        self, control: GlooControl, device: torch.device, backend: str, timeout: timedelta
    ) -> None:
        self.control = control
        self.device = device
        self.ranks = control.groups.members.ranks
        self.rank, self.world = control.rank, control.world
        self._groups = Groups(control.groups.members, control.groups.peers)
        for name in dict.fromkeys((self.gradients, self.parameters)):
            self._groups.open(name, backend, timeout)

    @property
    def failed(self) -> bool:
        """On one of its groups, or of the control's."""
        return self._groups.failed or self.control.groups.failed

    def pieces(self, *, adds: bool) -> int:
        """As the library does it."""
        raise NotImplementedError

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """As the library does it."""
        raise NotImplementedError

    def scatter_memory(self, pieces: Sequence[Piece]) -> ScatterMemory:
        """This rank's own."""
        return OwnMemory(self, pieces)

    def gather_memory(self, nbytes: int) -> GatherMemory:
        """None: in place."""
        return GatherInPlace(self)

    def all_gather(self, buffer: Tensor) -> Work:
        """As the library does it."""
        raise NotImplementedError

    def all_to_all(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """Among the gradients' collectives."""
        call = exchange(recv, send, list(arriving), list(leaving))
        return self._groups.work("all_to_all", [(self.gradients, call)])

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Among the parameters' collectives."""
        with self._groups.named("broadcast"):
            dist.broadcast(buffer, self.ranks[source], group=self._groups[self.parameters])

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""
        return self._groups.failure(what, error)

    def close(self, *, waits: bool = True) -> None:
        """Gives the groups back, once; the job's own stays."""
        self._groups.close(waits=waits and not self.failed)
        self.control.close(waits=waits)


def exchange(
    recv: Tensor,
    send: Tensor,
    arriving: list[int] | None = None,
    leaving: list[int] | None = None,
) -> Call:
    """An all-to-all; without lengths of equal parts."""
    return lambda group: dist.all_to_all_single(
        *(recv, send),
        output_split_sizes=arriving,
        input_split_sizes=leaving,
        group=group,
        async_op=True,
    )
