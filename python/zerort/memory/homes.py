"""Where buckets are at home: on the device, or in part on the host.

A bucket's *state* (masters, sums, and what the optimizer keeps of it) or its *shard* of sharded
parameters may lie on the host. It is there all the time: what the device needs of it, or has for
it, is copied at the head or the tail of the bucket's hops. This is a rank's own affair: it changes
no collective, no order and no sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zerort import _core
from zerort.device import Host, Mark
from zerort.memory.flat import Memory

__all__ = ["Homes", "HostRoom", "Landing"]


class Landing:
    """Memory on the device where a bucket's sum is written before it leaves it."""

    def __init__(self, host: Host, nbytes: int) -> None:
        self._host = host
        self._memory, self._free = host.landing(nbytes)
        self._views: dict[tuple[torch.dtype, int], Memory] = {}

    def open(self, dtype: torch.dtype, numel: int) -> Memory:
        """(numel,), which the current stream may write: behind the last copy out of it."""
        self._free.order()
        key = dtype, numel
        if key not in self._views:
            self._views[key] = Memory.of(self._memory.view(dtype).narrow(0, 0, numel))
        return self._views[key]

    def take(self, here: Tensor) -> Mark:
        """Copies what was written to the host, beside what is enqueued next."""
        self._free = self._host.take(here, self._views[here.dtype, here.numel()].tensor)
        return self._free


class HostRoom:
    """What all buckets share whose state is on the host: two landings on the device, so that one is
    written while the other is copied, and two pieces of the host's in which masters are cast before
    they leave it.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self._landings: list[Landing | None] = [None, None]
        self._landing_turn = 0
        self._reserved = self._widest = 0
        self._casts: list[Tensor | None] = [None, None]
        self._marks: list[Mark | None] = [None, None]
        self._turn = 0

    def reserve(self, *, sums: int = 0, values: int = 0) -> None:
        """A bucket with so many bytes of sums, or of parameters, uses this memory."""
        self._reserved, self._widest = max(self._reserved, sums), max(self._widest, values)

    def landing(self) -> Landing:
        """The one that was used before the last."""
        turn = self._landing_turn
        self._landing_turn = 1 - turn
        landing = self._landings[turn]
        if landing is None:
            landing = self._landings[turn] = Landing(self.host, self._reserved)
        return landing

    def release(self) -> None:
        """Gives the landings back, until they are asked for again."""
        self._landings = [None, None]

    def send_cast(self, there: Tensor, here: Tensor) -> None:
        """Casts `here`, on the host, to what `there` is, and copies it to the device. Returns with
        the cast: the host may go on writing into `here`.
        """
        turn = self._turn
        self._turn = 1 - turn
        if (mark := self._marks[turn]) is not None:
            mark.wait()
        cast = self._cast(turn, there)
        cast.copy_(here)
        self._marks[turn] = self.host.send(there, cast)

    def _cast(self, turn: int, like: Tensor) -> Tensor:
        memory = self._casts[turn]
        if memory is None:
            memory = self._casts[turn] = self.host.zeros(self._widest, torch.uint8)
        return memory.view(like.dtype).narrow(0, 0, like.numel())


@dataclass(frozen=True)
class Homes:
    """Which buckets have something on the host, by their number."""

    room: HostRoom | None = None
    """Of those whose state is there."""
    state: frozenset[int] = frozenset()
    shards_host: Host | None = None
    """Where all shards of sharded parameters are."""

    def room_of(self, spec: _core.Bucket) -> HostRoom | None:
        """Where a bucket's state is; None on the device."""
        return self.room if spec.id in self.state else None

    def shard_host_of(self, spec: _core.Bucket) -> Host | None:
        """Where a bucket's shard is; None on the device."""
        return self.shards_host if spec.sharded else None

    @staticmethod
    def chosen(buckets: Sequence[_core.Bucket], ratio: float) -> frozenset[int]:
        """Trained buckets whose state goes to the host, of all `buckets`: the last ones, with at
        least `ratio` of their elements.
        """
        trained = [spec for spec in buckets if spec.group is not None]
        stays = (1.0 - ratio) * sum(spec.shard_numel for spec in trained)
        found, here = set(), 0
        for spec in trained:
            here += spec.shard_numel
            if here > stays:
                found.add(spec.id)
        return frozenset(found)
