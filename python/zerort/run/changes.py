"""What is written into parameters while they are whole for a pass, and lost with that.

A write that torch counts shows in a parameter's version. One through `.data`, `detach()` or numpy
does not, so before a unit is freed this rank's part of its values is compared with the shard, bit
for bit. Where that needs a wait, the answer stays on the device until `read`.

What it guarantees: what is written into this rank's part is named, in every pass. What it does not
do: a rank has nothing to compare other ranks' parts with, so what one rank alone writes there
without torch's knowledge is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zerort.memory import HeldBucket

__all__ = ["Changes", "lost"]


class Changes:
    """Of one rank. Each write is told of once."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._places: dict[HeldBucket, Tensor] = {}
        """The first that has changed, of buckets on a device that has not been waited for."""

    def note(self, name: str) -> None:
        """A parameter has been written."""
        self._name = self._name or name

    def look(self, bucket: HeldBucket) -> None:
        """Before a bucket that is whole is freed."""
        place = bucket.first_change()
        if isinstance(place, Tensor):
            before = self._places.get(bucket)
            self._places[bucket] = place if before is None else torch.minimum(before, place)
        elif place is not None and (name := bucket.owner_of(place)) is not None:
            self.note(name)

    def take(self) -> str | None:
        """The parameter that was written first, as far as is known without a wait."""
        name, self._name = self._name, None
        return name

    def read(self) -> str | None:
        """The parameter that was written first; waits for the device, where that has to say."""
        places = torch.stack(list(self._places.values())).tolist() if self._places else []
        for bucket, place in zip(self._places, places, strict=True):
            if (name := bucket.owner_of(place)) is not None:
                self.note(name)
        self._places = {}
        return self.take()

    def forget(self, buckets: Iterable[HeldBucket] | None = None) -> None:
        """Of what was written, into these buckets or any, nothing is to be told."""
        self._name = None
        for bucket in list(self._places) if buckets is None else buckets:
            self._places.pop(bucket, None)


def lost(name: str) -> str:
    """What is said of a parameter that was written where only shards are kept."""
    return (
        f"parameter {name} was written in a forward or a backward while it was whole, and the "
        "change is lost, because only shards are kept: write between steps, inside "
        "zerort.zero.GatheredParameters(parameters, modifier_rank=0)"
    )
