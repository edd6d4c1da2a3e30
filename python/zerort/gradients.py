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

    def collect(self) -> None:
        """A micro-batch that is not reduced is over."""

    def pack(self, wire: WireFormat, send: Tensor, slots: list[Tensor]) -> list[int]:
        """Encodes the gradient into `send`, of which `slots` are views, one per parameter; `.grad` is None afterwards.

        Returns the positions in the bucket of parameters without a gradient; their slots are zero.
        """

    def drop(self) -> None:
        """Forgets everything that has not been packed."""


class Stolen:
    """Straight from `.grad`."""

    def __init__(self, bucket: FlatBucket) -> None:
        self._params = bucket.params

    def collect(self) -> None:
        """Autograd goes on adding into `.grad`."""

    def pack(self, wire: WireFormat, send: Tensor, slots: list[Tensor]) -> list[int]:
        """One batched copy of all gradients."""
        gradients = _take(self._params)
        absent = [i for i, gradient in enumerate(gradients) if gradient is None]
        if absent:
            torch._foreach_zero_([slots[i] for i in absent])
            slots = [slot for slot, gradient in zip(slots, gradients, strict=True) if gradient is not None]
        present = [gradient for gradient in gradients if gradient is not None]
        if present:
            wire.encode(present, slots)
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
