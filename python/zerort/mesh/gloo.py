"""CPU tensors over gloo."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.mesh.comm import Work
from zerort.mesh.control import GlooControl
from zerort.mesh.data import GroupComm

__all__ = ["GlooComm"]


class GlooComm(GroupComm):
    """CPU tensors over gloo: all-to-all for reduce-scatter, one in-place broadcast per rank for
    all-gather.
    """

    # Two groups, each with its own workers: publishing does not queue behind gradients.
    gradients, parameters = "gradients", "parameters"
    window: int | None = None

    def __init__(self, control: GlooControl, device: torch.device, timeout: timedelta) -> None:
        super().__init__(control, device, "gloo", timeout)

    def pieces(self, *, adds: bool) -> int:
        """One from each rank."""
        return self.world

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Every rank's piece of this rank's shard, in rank order."""

        group = self._groups[self.gradients]

        def exchange() -> dist.Work | None:
            return dist.all_to_all_single(recv, send, group=group, async_op=True)

        return self._groups.work("all_to_all", self.gradients, [exchange])

    def all_gather(self, buffer: Tensor) -> Work:
        """One broadcast per rank, in rank order, on its slice."""
        group = self._groups[self.parameters]

        # gloo's all_gather stages through fresh buffers: three times the CPU time of these
        # broadcasts.
        def broadcast(shard: Tensor, rank: int) -> dist.Work | None:
            return dist.broadcast(shard, rank, group=group, async_op=True)

        shards = zip(buffer.chunk(self.world), self.ranks, strict=True)
        calls = [partial(broadcast, shard, rank) for shard, rank in shards]
        return self._groups.work("broadcast", self.parameters, calls)
