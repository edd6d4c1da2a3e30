"""CPU tensors over gloo, in both directions of a link at once.

gloo has one connection between two ranks of a group, and a message leaves only once its receiver
has said, on that connection, that it waits for it. Those words queue up behind whatever the
receiver itself is sending, so two large messages that cross on one connection follow one another:

    one group     rank 0  ──── data ────▶              rank 1 says what it waits for behind its own
                  rank 1                ◀──── data ────                                    data

    two groups    rank 0  ──── data ────▶              each direction has a connection on which
                  rank 1  ◀──── data ────              nothing else is sent but such words

So large messages to higher ranks have a group of their own, those to lower ranks another, and
large broadcasts are dealt out to two as well. The second groups are made with the first memory for
large messages: a group costs each rank a thread per worker and a connection to every other.

What it guarantees: calls and their groups follow from sizes that all ranks know, so that all ranks
make the same; what arrives is what one group would have brought, to the bit. Who comes to make a
group hears of a rank that has failed meanwhile. What it does not do: it does not know how fast a
link is.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.mesh.comm import GatherMemory, Piece, ScatterMemory, Work
from zerort.mesh.control import GlooControl
from zerort.mesh.data import GroupComm, exchange
from zerort.mesh.rounds import come

__all__ = ["GlooComm"]

_GLOO = "gloo"
_DOWN, _ODD = "gradients to lower ranks", "parameters of odd ranks"
_LARGE = 128 << 10
"""Bytes to one rank. A second collective costs some 0.1 ms of a core, in which a link of 1 Gbit
carries a tenth of this.
"""


class GlooComm(GroupComm):
    """CPU tensors over gloo: all-to-all for reduce-scatter, one in-place broadcast per rank for
    all-gather.
    """

    # Each with its own workers: publishing does not queue behind gradients.
    gradients, parameters = "gradients", "parameters"
    window: int | None = None

    def __init__(self, control: GlooControl, device: torch.device, timeout: timedelta) -> None:
        super().__init__(control, device, _GLOO, timeout)
        self.job = control
        """The control group of all ranks of the job, of which these may be a part."""
        if len({len(part) for part in control.groups.members.parts}) > 1:
            # a rank that is alone in its part asks for no memory, and has to be there all the same
            self._groups.open_later(_DOWN, _GLOO)
            self._groups.open_later(_ODD, _GLOO)

    def pieces(self, *, adds: bool) -> int:
        """One from each rank."""
        return self.world

    def scatter_memory(self, pieces: Sequence[Piece]) -> ScatterMemory:
        """This rank's own, and where large pieces go through it the second group."""
        self._widen(_DOWN, max(piece.nbytes for piece in pieces))
        return super().scatter_memory(pieces)

    def gather_memory(self, nbytes: int) -> GatherMemory:
        """None: in place. But a second group where there is much to gather."""
        self._widen(_ODD, nbytes)
        return super().gather_memory(nbytes)

    def _widen(self, name: str, nbytes: int) -> None:
        """Makes the second group `name`, once, where messages are so large."""
        if nbytes >= _LARGE and name not in self._groups:
            come(self.job)  # else who waits for a rank that has failed waits for the time-out
            self._groups.open_later(name, _GLOO)

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Every rank's piece of this rank's shard, in rank order."""
        length = send.numel() // self.world
        if length * send.itemsize < _LARGE or _DOWN not in self._groups:
            return self._groups.work("all_to_all", [(self.gradients, exchange(recv, send))])
        each = [length] * self.world
        return self._both_ways(recv, send, each, each)

    def all_to_all(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """Among the gradients' collectives."""
        if _DOWN not in self._groups:
            return super().all_to_all(recv, send, arriving, leaving)
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
        return self._groups.work("all_to_all", [(self.gradients, up), (_DOWN, down)])

    def all_gather(self, buffer: Tensor) -> Work:
        """One broadcast per rank, in rank order, on its slice."""
        # gloo's all_gather stages through fresh buffers: three times the CPU time of these
        # broadcasts.
        shards = buffer.chunk(self.world)
        names = [self.parameters, self.parameters]
        if shards[0].nbytes >= _LARGE and _ODD in self._groups:
            names[1] = _ODD
        return self._groups.work(
            "broadcast",
            [
                (names[place % 2], partial(_broadcast, shard, rank))
                for place, (shard, rank) in enumerate(zip(shards, self.ranks, strict=True))
            ],
        )


def _broadcast(shard: Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work | None:
    return dist.broadcast(shard, rank, group=group, async_op=True)
