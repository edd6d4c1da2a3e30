"""The contract of a wire format and of the encoder that it makes for each bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zerort import _core
from zerort.memory import FlatBucket, Memory
from zerort.wire.scratch import Scratch

__all__ = ["Buffers", "Encoder", "Extent", "Kept", "Terms", "WireFormat"]


@dataclass(frozen=True)
class Extent:
    """What of a bucket is encoded: `numel` elements from `start` on, in `world` equal pieces, one
    for each rank of a group. A part of a bucket is sent where others have been summed before.
    """

    bucket: FlatBucket
    start: int
    numel: int
    world: int

    @property
    def shard_numel(self) -> int:
        """Of a piece, in elements."""
        return self.numel // self.world

    def slots(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat` (numel,), one per parameter in its shape; none of a part of a bucket,
        whose gradients arrive flat.
        """
        whole = self.numel == self.bucket.spec.numel
        return self.bucket.slots(flat) if whole else []


@dataclass(frozen=True)
class Buffers:
    """Memory that an encoder works in while its bucket is in flight. Where the format has a dtype
    the tensors are of it, else they are bytes.
    """

    send: Memory
    """A piece for each rank, in rank order, each of the format's `shard_bytes`."""
    own: Memory
    """This rank's piece of `send`."""
    recv: Memory
    """What has arrived for this rank's shard: a piece from each rank, in rank order, or one where
    the network has added. It may be `own`.
    """
    shared: bool
    """Whether other buckets use it too, in turn."""
    pieces: int
    """How many lie in `recv`."""
    stride: int
    """Elements from the start of one to the start of the next; what lies between is not read."""
    slots: Sequence[Tensor]
    """Views of `send`, one per parameter in its shape, where it is a bucket's elements as they
    are; else none.
    """
    rests: bool
    """Whether what lies in `slots` between two passes stays there, and is sent with the next."""


@dataclass(frozen=True)
class Terms:
    """What the encoders of one engine have in common on this rank."""

    predivide: float = 1.0
    """Gradients are divided by it before they are encoded, and their sums multiplied by it after
    they have been decoded.
    """
    feedback: bool = False
    """Whether what a format rounds off is added to the next gradient."""
    rank: int = 0
    """In the job."""
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(frozen=True)
class Kept:
    """What a checkpoint may hold of an encoder."""

    windows: int = 0
    """That were applied, where rounding depends on it."""
    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    """What has been rounded off, as bytes, by a name for each."""


class Encoder(Protocol):
    """One bucket's encoding on this rank."""

    rounds: bool
    """Whether finished sums are gathered encoded, because they then take fewer bytes than in the
    accumulator.
    """

    @property
    def slots(self) -> Sequence[Tensor]:
        """Views of the send buffer, one per parameter in its shape, in which a gradient may lie
        until it is sent; none where gradients are not sent as they lie.
        """

    def bind(self, buffers: Buffers) -> None:
        """Takes memory, before each time that something is encoded. State is kept. A call for each
        bucket and pass: what is made of the memory is to be made once.
        """

    def release(self) -> None:
        """Gives that memory back: `bind` comes before anything else. State is kept. A second call
        does nothing.
        """

    def encode(self, gradients: Sequence[Tensor | None]) -> None:
        """Writes the bucket's gradients, one per parameter, into the send buffer; None is zero. One
        that lies in its slot is there already.
        """

    def encode_flat(self, gradient: Tensor) -> None:
        """The same for the gradient of all of the extent (numel,), padding included."""

    def clear(self) -> None:
        """Makes the send buffer zeros, encoded. State is kept."""

    def decode(self, accum: Memory, *, scale: float, add: bool) -> float | Tensor:
        """Sums what has arrived, times `scale`, over or onto `accum` (shard_numel,).

        Returns the squared norm of `accum` afterwards, in fp64: a float on CPU, a scalar tensor on
        an accelerator. It is not finite exactly when an element is not.
        """

    def piece(self, source: int) -> _core.Buffer:
        """What has arrived from rank `source` (shard_numel,), on CPU. Asked only where a sum is not
        finite, to name the rank that brought it.
        """

    def round(self, total: Memory) -> float | Tensor:
        """Encodes a finished sum (shard_numel,) into this rank's piece of the send buffer, to be
        gathered; returns the squared norm of what all ranks will read there, as `decode` does.
        """

    def spread(self, accum: Memory) -> None:
        """Writes the sums that have been gathered in the send buffer into `accum` (numel,)."""

    def close(self, *, applied: bool, growth: float) -> None:
        """An accumulation window is over, and nothing of it is in flight.

        What was encoded in it is in the parameters if `applied`; else it was dropped, and state
        becomes what it was before. From now on gradients are `growth` times as large, because the
        loss scale has moved, and state in their units with them.
        """

    def forget(self) -> None:
        """State begins anew, because another state of the model has been loaded."""

    def kept(self) -> Kept:
        """State as it is between two windows; tensors are views of it."""

    def restore(self, kept: Kept) -> None:
        """Takes such a state. Residuals that are not in it stay as they are."""


class WireFormat(Protocol):
    """How a bucket is encoded, and what that costs.

    An encoder may keep state from step to step, such as what it has rounded off.
    """

    @property
    def dtype(self) -> torch.dtype | None:
        """What each element is sent as; None where elements are packed into bytes."""

    @property
    def adds(self) -> bool:
        """Whether a network may add what is encoded, element by element. Where it may not, pieces
        are exchanged, and added where they arrive.
        """

    def shard_bytes(self, numel: int) -> int:
        """How many bytes a shard of `numel` elements takes on the wire: a multiple of 4, and of the
        dtype's size. `numel` is a multiple of 128.
        """

    def kept_bytes(self, shard: int, world: int, *, gathers: bool) -> int:
        """How many bytes an encoder keeps from step to step, where there is feedback, of a bucket
        of `world` shards of `shard` elements, whose finished sums are gathered or not.
        """

    def suits(self, shape: Sequence[int], *, embeds: bool) -> bool:
        """Whether gradients of this shape, of an embedding or not, are sent so; others are sent in
        16 bits.
        """

    def encoder(self, extent: Extent, terms: Terms) -> Encoder:
        """A new encoder of a bucket, or of a part of it."""
