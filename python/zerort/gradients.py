"""Where a gradient waits between autograd and its bucket's Launch.

Two sources, chosen once for an engine. `Stolen` packs straight from `.grad`: autograd adds micro-batches up there by
itself. `Summed` is for parameters of less than fp32 that are reduced once per accumulation window: their micro-batches
would lose bits in `.grad`, so each is added into an fp32 buffer as soon as its backward is over.

Both leave `.grad` as None behind what they took, and both name what never came.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from zerort.flat import FlatBucket, Memory, laid_out_like
from zerort.wire import WireFormat

__all__ = ["Source", "Stolen", "Summed"]


class Source(Protocol):
    """One bucket's gradient on this rank, before it travels."""

    def rest_in(self, slots: list[Tensor]) -> None:
        """Offers the bucket's own send buffer, as one view per parameter, to keep gradients in until it is packed."""

    def collect(self) -> None:
        """A micro-batch that is not reduced is over."""

    def pack(self, wire: WireFormat, send: Tensor, slots: list[Tensor]) -> list[int]:
        """Encodes the gradient into `send`, of which `slots` are views, one per parameter; `.grad` is None afterwards.

        Returns the positions in the bucket of parameters without a gradient; their slots are zero.
        """

    def drop(self) -> None:
        """Forgets everything that has not been packed."""


class Stolen:
    """Straight from `.grad`.

    After a micro-batch that is not reduced `.grad` rests in the send buffer, where it fits: autograd goes on adding
    there in place, and at the boundary there is nothing left to copy and no second copy to keep.
    """

    def __init__(self, bucket: FlatBucket) -> None:
        self._params = bucket.params
        self._slots: list[Tensor] = []

    def rest_in(self, slots: list[Tensor]) -> None:
        """Fits when it is of the gradients' dtype."""
        self._slots = slots if all(s.dtype == p.dtype for s, p in zip(slots, self._params, strict=True)) else []

    def collect(self) -> None:
        """Moves what is not there yet into the send buffer, in one batch."""
        moving = [
            (parameter, slot)
            for parameter, slot in zip(self._params, self._slots, strict=False)
            if parameter.grad is not None and parameter.grad is not slot
        ]
        if moving:
            torch._foreach_copy_([slot for _, slot in moving], [p.grad for p, _ in moving if p.grad is not None])
        for parameter, slot in moving:
            parameter.grad = slot

    def pack(self, wire: WireFormat, send: Tensor, slots: list[Tensor]) -> list[int]:
        """One batched copy of all gradients that are not in their slots already."""
        gradients = _take(self._params)
        absent = [i for i, gradient in enumerate(gradients) if gradient is None]
        if absent:
            torch._foreach_zero_([slots[i] for i in absent])
        moving = [(g, s) for g, s in zip(gradients, slots, strict=True) if g is not None and g is not s]
        if moving:
            wire.encode([gradient for gradient, _ in moving], [slot for _, slot in moving])
        return absent

    def drop(self) -> None:
        """Sets every `.grad` to None."""
        _take(self._params)


class Summed:
    """Through an fp32 buffer of the bucket's size."""

    def __init__(self, bucket: FlatBucket) -> None:
        self._params = bucket.params
        self._sum = Memory.zeros(bucket.spec.numel, torch.float32, bucket.values.tensor.device).tensor
        pieces = zip(bucket.spec.offsets, bucket.spec.numels, bucket.params, strict=True)
        self._views = [laid_out_like(self._sum.narrow(0, at, length), p) for at, length, p in pieces]
        self._came = [False] * len(bucket.params)

    def rest_in(self, slots: list[Tensor]) -> None:
        """Declined: the wire is narrower than the sum."""

    def collect(self) -> None:
        """Adds `.grad` into the sum, in one batch."""
        gradients = _take(self._params)
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        for i in present:
            self._came[i] = True
        if present:
            torch._foreach_add_(
                [self._views[i] for i in present], [gradient for gradient in gradients if gradient is not None]
            )

    def pack(self, wire: WireFormat, send: Tensor, slots: list[Tensor]) -> list[int]:
        """Adds what is in `.grad` and encodes the sum."""
        self.collect()
        wire.encode([self._sum], [send])
        absent = [i for i, came in enumerate(self._came) if not came]
        self.drop()
        return absent

    def drop(self) -> None:
        """Zeroes the sum."""
        _take(self._params)
        self._sum.zero_()
        self._came = [False] * len(self._params)


def _take(params: list[torch.nn.Parameter]) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in params]
    for parameter in params:
        parameter.grad = None
    return gradients
