"""CPU tensors over gloo."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.mesh.comm import Work
from zerort.mesh.groups import GroupComm

__all__ = ["GlooComm"]


class GlooComm(GroupComm):
    """CPU tensors over gloo: all-to-all for reduce-scatter, one in-place broadcast per rank for
    all-gather.
    """

    backend = "gloo"
    window: int | None = None

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        super().__init__(device, timeout)
        self.chunks = self.world

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Every rank's piece of this rank's shard, in rank order."""

        def exchange() -> dist.Work | None:
            return dist.all_to_all_single(recv, send, group=self._gradients, async_op=True)

        return self._work("all_to_all", self._gradients, [exchange])

    def all_gather(self, buffer: Tensor) -> Work:
        """One broadcast per rank, in rank order, on its slice."""

        # gloo's all_gather stages through fresh buffers: three times the CPU time of these
        # broadcasts.
        def broadcast(shard: Tensor, rank: int) -> dist.Work | None:
            return dist.broadcast(shard, rank, group=self._parameters, async_op=True)

        shards = enumerate(buffer.chunk(self.world))
        calls = [partial(broadcast, shard, rank) for rank, shard in shards]
        return self._work("broadcast", self._parameters, calls)
