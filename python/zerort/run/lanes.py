"""The memory of buckets in flight.

A lane is memory that is used by buckets that follow one another at the window's distance. For each
leg it has what the leg's communicator gives, so that a communicator may send from memory that its
peers see, and between two legs the sums of the first.

What it guarantees: all of it is allocated when a plan is taken, and never in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zerort.device import Lane
from zerort.memory import FlatBucket, Memory
from zerort.mesh import Comm, Mesh, Piece, Scatter, ScatterMemory
from zerort.run.flight import Leg, Transport
from zerort.wire import Buffers

__all__ = ["LaneMemory", "LegMemory", "Turn", "full_precision", "lane_for"]


@dataclass(frozen=True)
class Turn:
    """What one reduce-scatter uses: the memory as the encoder sees it, and as the communicator."""

    buffers: Buffers
    scatter: Scatter


@dataclass(frozen=True)
class LegMemory:
    """Of one bucket's leg."""

    memory: ScatterMemory
    turns: Sequence[Turn]

    def next(self) -> Turn:
        """What is to be used now; the same until the collective over it has been started."""
        return self.turns[self.memory.turn()]


@dataclass(frozen=True)
class LaneMemory:
    """Of one lane: by a leg's number what its communicator gave, and bytes for the sums of the leg
    before it.
    """

    scatters: Sequence[ScatterMemory]
    between: Sequence[Memory]
    last: Memory
    """Bytes for what copies of the model state sum up together; empty where there is one."""
    lane: Lane
    """When the device is done with it."""
    shared: bool
    """Whether several buckets use it."""

    def leg(self, number: int, leg: Leg, comm: Comm) -> LegMemory:
        """As the bucket of `leg` sees it."""
        memory = self.scatters[number]
        scatters = memory.scatters(_piece(leg))
        turns = [_turn(leg, comm, scatter, self.shared) for scatter in scatters]
        return LegMemory(memory, turns)

    def sums(self, number: int, leg: Leg) -> Memory:
        """Where what the leg before leaves is, in full precision (extent's numel,)."""
        return _in_full(self.between[number - 1], leg)

    def totals(self, leg: Leg) -> Memory:
        """Where all pieces of what copies have summed come together (extent's numel,)."""
        return _in_full(self.last, leg)


def lane_for(users: Sequence[Transport], mesh: Mesh, lane: Lane) -> LaneMemory:
    """Memory for the largest of `users`, which are in flight one after the other."""
    legs = [*zip(*(transport.legs for transport in users), strict=True)]
    scatters = [mesh[each[0].group].scatter_memory([*map(_piece, each)]) for each in legs]
    sizes = [max(map(_full_bytes, each)) for each in legs[1:]]
    between = [Memory.zeros(size, torch.uint8, mesh.device) for size in sizes]
    copies = legs[-1][0].group == "replica"
    last = Memory.zeros(sizes[-1] if copies else 0, torch.uint8, mesh.device)
    return LaneMemory(scatters, between, last, lane, shared=len(users) > 1)


def full_precision(bucket: FlatBucket) -> torch.dtype:
    """What a bucket's gradients are summed in where nothing is to be lost."""
    return torch.promote_types(bucket.values.tensor.dtype, torch.float32)


def _in_full(memory: Memory, leg: Leg) -> Memory:
    numel, dtype = leg.extent.numel, full_precision(leg.extent.bucket)
    return Memory.of(memory.tensor.narrow(0, 0, numel * dtype.itemsize).view(dtype))


def _full_bytes(leg: Leg) -> int:
    return leg.extent.numel * full_precision(leg.extent.bucket).itemsize


def _piece(leg: Leg) -> Piece:
    dtype = leg.wire.dtype or torch.uint8
    length = leg.wire.shard_bytes(leg.extent.shard_numel) // dtype.itemsize
    return Piece(length, dtype, leg.wire.adds)


def _turn(leg: Leg, comm: Comm, scatter: Scatter, shared: bool) -> Turn:
    length = _piece(leg).length
    own = scatter.send.narrow(0, comm.rank * length, length)
    slots = [] if leg.wire.dtype is None else leg.extent.slots(scatter.send)
    buffers = Buffers(
        Memory.of(scatter.send),
        Memory.of(own),
        Memory.of(scatter.recv),
        shared,
        scatter.pieces,
        scatter.stride,
        slots,
        rests=not shared,
    )
    return Turn(buffers, scatter)
