"""How a bucket travels: what autograd wrote is encoded into a send buffer, what arrives is summed
into an accumulator.

A wire format guarantees that encoding and decoding touch every element once, and that the sum runs
in rank order with at least fp32 accumulation wherever this package does the summing. To add one: a
file here, and a row in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zerort.memory import Memory
from zerort.wire.dense import Dense

__all__ = ["FORMATS", "NAMES", "WireFormat"]


class WireFormat(Protocol):
    """Encodes gradients for the wire and decodes what arrives."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the send and receive buffers."""

    def encode(self, gradients: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
        """Writes each gradient into its slot, a view of the send buffer of its shape."""

    def decode(self, chunks: Memory, accum: Memory, *, scale: float, add: bool) -> float | Tensor:
        """Sums the chunks that arrived (a multiple of n,), in rank order, times `scale`, into or
        onto `accum` (n,).

        Returns the squared norm of `accum` afterwards, in fp64: a float on CPU, a scalar tensor on
        CUDA (no host sync). It is not finite exactly when an element is not.
        """

    def round(self, total: Memory, out: Memory) -> float | Tensor:
        """Writes a finished sum (n,) into `out` (n,) of `dtype`, to be gathered; returns the
        squared norm of `out`.
        """


FORMATS: dict[str, WireFormat] = {
    "fp32": Dense(torch.float32),
    "bf16": Dense(torch.bfloat16),
    "fp16": Dense(torch.float16),
    "fp64": Dense(torch.float64),
}

NAMES: tuple[str, ...] = tuple(FORMATS)
"""By the number that a plan knows a format by."""
