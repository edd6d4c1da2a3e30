"""Who brought an infinity or NaN. Only asked once a sum has turned out not to be finite."""

from __future__ import annotations

from bisect import bisect_right

import torch

from zerort import _core
from zerort.memory import FlatBucket
from zerort.mesh import Comm
from zerort.run.flight import Leg

__all__ = ["in_arrival", "in_sum"]

UNKNOWN = -1


def in_arrival(leg: Leg, pieces: int, comm: Comm) -> tuple[int, int] | None:
    """(source rank, parameter) of the first such element among the `pieces` that arrived for this
    rank on a leg, on CPU. On the first leg they are of ranks, on another of hosts or copies, whose
    own ranks know who it was.
    """
    extent = leg.extent
    start = extent.start + comm.rank * extent.shard_numel
    for source in range(pieces):
        index = _core.first_nonfinite(leg.encoder.piece(source))
        if index is not None:
            first = extent.numel == extent.bucket.spec.numel
            rank = comm.ranks[source] if first else UNKNOWN
            return rank, _parameter_at(extent.bucket, start + index)
    return None


def in_sum(bucket: FlatBucket, rank: int) -> tuple[int, int] | None:
    """(unknown rank, parameter): after a sum on the wire its rank is not known."""
    found = torch.nonzero(~torch.isfinite(bucket.reduced_shard.tensor))
    if not found.numel():
        return None
    return UNKNOWN, _parameter_at(bucket, rank * bucket.spec.shard_numel + int(found[0, 0]))


def _parameter_at(bucket: FlatBucket, element: int) -> int:
    return bucket.spec.params[bisect_right(bucket.spec.offsets, element) - 1]
