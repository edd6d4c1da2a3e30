"""How much memory a bucket takes on one rank, and where: said before there is any.

What this guarantees: the kinds, dtypes and places are those of `buckets`, which asks `Dtypes` too.
What it does not do: it allocates nothing, and knows no device but by `Places`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch

__all__ = ["Asked", "Dtypes", "Kind", "Piece", "Places", "Shape", "pieces", "shared_pieces"]


class Asked(Protocol):
    """What a configuration asks for beside each parameter's own dtype."""

    @property
    def sums(self) -> torch.dtype:
        """What gradients of less than fp32 are added up in."""

    @property
    def low_masters(self) -> bool:
        """Whether parameters of less than fp32 are their own masters."""

    @property
    def wide_states(self) -> bool:
        """Whether what the optimizer keeps beside such is fp32 all the same."""


@dataclass(frozen=True)
class Dtypes:
    """Of one bucket."""

    values: torch.dtype
    master: torch.dtype
    sums: torch.dtype
    state: torch.dtype
    """What the optimizer computes and keeps its state in, which may be wider than the masters."""
    widens: bool
    """Whether gradients are added up in a wider dtype than the parameters'."""

    @classmethod
    def of(cls, values: torch.dtype, asked: Asked) -> Dtypes:
        """Of parameters in `values`; fp64 stays whole throughout."""
        precise = torch.float64 if values == torch.float64 else torch.float32
        master = values if asked.low_masters else precise
        sums = asked.sums if precise == torch.float32 else precise
        state = precise if asked.wide_states else master
        return cls(values, master, sums, state, values not in (precise, sums))


@dataclass(frozen=True)
class Shape:
    """A bucket, in elements."""

    dtypes: Dtypes
    numel: int
    """Of the whole."""
    owned: int
    """Of what this rank keeps the optimizer's state of."""
    shard: int
    trained: bool = True
    sharded: bool = False
    """Its parameters are, between their uses."""
    sums_locally: bool = False
    """Micro-batches are added up on this rank before they are reduced."""
    state_bytes: int = 0
    """Of the optimizer's state on this rank."""


@dataclass(frozen=True)
class Places:
    """What of a bucket is on the host, beside a device, and whether in page-locked memory."""

    state: bool = False
    """Masters, sums and the optimizer's state."""
    shards: bool = False
    """The shard of sharded parameters."""
    state_pinned: bool = False
    shards_pinned: bool = False


class Kind(Enum):
    """What memory is for."""

    PARAMETERS = "parameters"
    KEPT = "kept for its host"
    MASTERS = "masters"
    SUMS = "gradient sums"
    STATE = "optimizer state"
    ON_THEIR_WAY = "gradients on their way"
    FEEDBACK = "error feedback"
    GATHERED = "gathered, at most"
    UNPLANNED = "in no bucket"


class Piece(NamedTuple):
    """One allocation."""

    kind: Kind
    nbytes: int
    on_host: bool = False
    pinned: bool = False

    @property
    def locked(self) -> int:
        """Bytes of page-locked memory: torch rounds such a piece up to a power of two."""
        return 1 << (self.nbytes - 1).bit_length() if self.pinned and self.nbytes else 0


def pieces(shape: Shape, places: Places) -> Iterator[Piece]:
    """What one bucket takes at rest."""
    item = shape.dtypes.values.itemsize
    if shape.sharded:
        pinned = places.shards and places.shards_pinned
        yield Piece(Kind.PARAMETERS, shape.shard * item, places.shards, pinned)
    else:
        yield Piece(Kind.PARAMETERS, shape.numel * item)
    if not shape.trained:
        return
    yield from _master(shape, places)
    yield from _sums(shape, places)
    yield Piece(Kind.STATE, shape.state_bytes, places.state)


def _master(shape: Shape, places: Places) -> Iterator[Piece]:
    beside_shards = shape.sharded and places.shards
    together = places.state == beside_shards
    if together and shape.dtypes.master == shape.dtypes.values:
        return
    # one that is cast from a shard on the host is torch's, in ordinary memory
    pinned = places.state and places.state_pinned and not beside_shards
    yield Piece(Kind.MASTERS, shape.owned * shape.dtypes.master.itemsize, places.state, pinned)


def _sums(shape: Shape, places: Places) -> Iterator[Piece]:
    item = shape.dtypes.sums.itemsize
    local = shape.sums_locally and shape.dtypes.widens
    if places.state:
        yield Piece(Kind.SUMS, shape.shard * item, on_host=True, pinned=places.state_pinned)
    whole = shape.owned > shape.shard or local
    if whole or not places.state:
        yield Piece(Kind.SUMS, (shape.numel if whole else shape.shard) * item)


def shared_pieces(buckets: Iterable[tuple[Shape, Places]]) -> Iterator[Piece]:
    """What all buckets share whose state is on the host: where sums land on the device, and where
    masters are cast on the host.
    """
    homed = [(shape, places) for shape, places in buckets if places.state and shape.trained]
    if not homed:
        return
    landing = max(shape.shard * shape.dtypes.sums.itemsize for shape, _ in homed)
    for _ in range(2):
        yield Piece(Kind.SUMS, landing)
    sent = [shape for shape, places in homed if not (shape.sharded and places.shards)]
    if any(shape.dtypes.master != shape.dtypes.values for shape in sent):
        widest = max(shape.owned * shape.dtypes.values.itemsize for shape in sent)
        for _ in range(2):
            yield Piece(Kind.PARAMETERS, widest, on_host=True, pinned=homed[0][1].state_pinned)
