"""CPU tensors over gloo, in both directions of a link at once.

gloo has one connection between two ranks of a group, and a message leaves only once its receiver
has said, on that connection, that it waits for it. Those words queue up behind whatever the
receiver itself is sending, so two large messages that cross on one connection follow one another:

    one group     rank 0  ──── data ────▶              rank 1 says what it waits for behind its own
                  rank 1                ◀──── data ────                                    data

    two groups    rank 0  ──── data ────▶              each direction has a connection on which
                  rank 1  ◀──── data ────              nothing else is sent but such words

So large messages to higher ranks have a group of their own, those to lower ranks another, and
broadcasts are dealt out to two as well. What it guarantees: calls and their groups follow from
sizes that all ranks know, so that all ranks make the same; what arrives is what one group would
have brought, to the bit. What it does not do: it does not know how fast a link is.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.mesh.comm import Work
from zerort.mesh.control import GlooControl
from zerort.mesh.data import GroupComm, exchange

__all__ = ["GlooComm"]

_LARGE = 128 << 10
"""Bytes to one rank. A second collective costs some 0.1 ms of a core, in which a link of 1 Gbit
carries a tenth of this.
"""


class GlooComm(GroupComm):
    """CPU tensors over gloo: all-to-all for reduce-scatter, one in-place broadcast per rank for
    all-gather.
    """

    # Each with its own workers: publishing does not queue behind gradients.
    gradients = ("gradients up", "gradients down")
    parameters = ("parameters even", "parameters odd")
    window: int | None = None

    def __init__(self, control: GlooControl, device: torch.device, timeout: timedelta) -> None:
        super().__init__(control, device, "gloo", timeout)

    def pieces(self, *, adds: bool) -> int:
        """One from each rank."""
        return self.world

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Every rank's piece of this rank's shard, in rank order."""
        length = send.numel() // self.world
        if length * send.itemsize < _LARGE:
            call = exchange(recv, send)
            return self._groups.work("all_to_all", [(self.gradients[0], call)])
        each = [length] * self.world
        return self._both_ways(recv, send, each, each)

    def all_to_all(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """Among the gradients' collectives."""
        return self._both_ways(recv, send, arriving, leaving)

    def _both_ways(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """In two collectives: to the ranks above this one, and to those below and itself."""
        above, below = self.rank + 1, self.rank
        start, end = sum(leaving[:above]), sum(arriving[:below])
        up = exchange(
            recv[:end],
            send[start:],
            [*arriving[:below], *([0] * (self.world - below))],
            [*([0] * above), *leaving[above:]],
        )
        down = exchange(
            recv[end:],
            send[:start],
            [*([0] * below), *arriving[below:]],
            [*leaving[:above], *([0] * (self.world - above))],
        )
        return self._groups.work("all_to_all", list(zip(self.gradients, (up, down), strict=True)))

    def all_gather(self, buffer: Tensor) -> Work:
        """One broadcast per rank, in rank order, on its slice."""
        # gloo's all_gather stages through fresh buffers: three times the CPU time of these
        # broadcasts.
        return self._groups.work(
            "broadcast",
            [
                (self.parameters[place % 2], partial(_broadcast, shard, rank))
                for place, (shard, rank) in enumerate(
                    zip(buffer.chunk(self.world), self.ranks, strict=True)
                )
            ],
        )


def _broadcast(shard: Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work | None:
    return dist.broadcast(shard, rank, group=group, async_op=True)
