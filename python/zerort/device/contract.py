"""The contract of a device: how its work is ordered, and its arithmetic, random numbers and memory.

What it guarantees: whatever a pass enqueues before `join` is ordered as the program reads, without
a wait of the host's, whichever streams gradients were made on. What it does not do: it knows no
buckets and no ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zerort import _core

__all__ = ["LINE", "Device", "Figures", "Flat", "Host", "Lane", "Mark", "Rounding", "Streams"]

LINE = 64
"""Bytes. In a bucket no two parameters share as many."""


class Flat(Protocol):
    """Flat memory as both sides see it: torch's tensor and the core's buffer, over the same
    bytes.
    """

    tensor: Tensor
    buffer: _core.Buffer


class Lane:
    """Memory of one bucket in flight, and two moments of it, None before the first: `packed` is
    behind the last write of gradients into it, `free` behind the last sum out of it.
    """

    __slots__ = ("free", "packed")

    def __init__(self) -> None:
        self.packed: Any = None
        self.free: Any = None


@dataclass(frozen=True)
class Rounding:
    """How elements become bytes: randomly where there is a `seed`; to the nearest where there is an
    `after`, of uint8, which gets what is left out, behind what it has or what is in `before`.
    """

    seed: int | None = None
    before: Flat | None = None
    after: Flat | None = None


@dataclass(frozen=True)
class Figures:
    """Bytes of a device's memory that this process's tensors take."""

    allocated: int
    """Now."""
    peak: int
    """At most, since the process began or torch was asked to forget."""


class Streams(Protocol):
    """The order of one engine's reduction on a device. No call makes the host wait."""

    def lane(self) -> Lane:
        """A lane that nothing has used."""

    def produced(self) -> None:
        """A gradient was written on the current stream."""

    def make_room(self, lane: Lane) -> None:
        """The current stream may write into the lane's memory."""

    def packing(self, lane: Lane | None) -> AbstractContextManager[object]:
        """Within, the current stream may read every gradient that was `produced`; what it writes
        goes into the lane, where there is one. Afterwards these gradients may be freed.
        """

    def packed(self) -> None:
        """All that was `produced` has been packed."""

    def summing(self, lane: Lane) -> AbstractContextManager[object]:
        """Within, work goes to the stream of sums, behind the lane's packing; afterwards it is the
        last use of the lane.
        """

    def join(self) -> None:
        """The current stream may read the accumulators."""

    def here(self) -> Callable[[], AbstractContextManager[object]]:
        """What makes the stream that is the current one now the current one again."""


class Mark(Protocol):
    """A moment behind a copy between a device and its host."""

    def wait(self) -> None:
        """The host stands still until it has passed: then it may read what was received, and write
        over what was sent.
        """

    def order(self) -> None:
        """The current stream does, and the host does not."""


class Host(Protocol):
    """The host's memory beside a device's, and copies between the two, of tensors of one dtype."""

    pinned: bool
    """Whether memory is page-locked, so that no copy makes the caller wait."""
    sent: int
    """Bytes that have gone to the device so far."""
    received: int
    """Bytes that have come from it."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Fresh memory (numel,) on the host."""

    def landing(self, nbytes: int) -> tuple[Tensor, Mark]:
        """Memory of the device (nbytes,), uint8, from which `take` copies; it may be written behind
        the mark.
        """

    def take(self, here: Tensor, there: Tensor) -> Mark:
        """As `receive`, of a landing; what is enqueued next does not wait for it."""

    def receive(self, here: Tensor, there: Tensor) -> Mark:
        """Copies `there`, on the device, into `here`, on the host, behind what is enqueued."""

    def send(self, there: Tensor, here: Tensor) -> Mark:
        """Copies `here`, on the host, into `there`, on the device, behind what is enqueued."""


class Device(Protocol):
    """A device and what zerort asks of it."""

    place: torch.device
    blocks: bool
    """Whether waiting for a collective blocks the host. Where it does, a hook asks first whether
    the collective is complete; where it does not, the wait is enqueued.
    """

    def streams(self) -> Streams:
        """The order of a reduction's work here."""

    def host(self, *, pinned: bool) -> Host | None:
        """The host's memory beside this device's; None where they are the same."""

    def reduce(
        self, chunks: Flat, accum: Flat, *, world: int, stride: int, scale: float, add: bool
    ) -> float | Tensor:
        """Sums `world` chunks of `accum`'s length, each `stride` elements behind the one before, in
        order and with at least fp32 accumulation, times `scale`, into `accum`, or onto it if `add`.

        Returns the squared norm of `accum` afterwards, in fp64: a float where that costs no wait,
        else a scalar tensor.
        """

    def squared_norm(self, memory: Flat) -> float | Tensor:
        """In fp64; a float where that costs no wait, else a scalar tensor."""

    def quantize(
        self, values: Flat, pieces: Flat, *, world: int, scale: float, rounding: Rounding
    ) -> None:
        """Writes fp32 `values`, times `scale`, into `pieces` of bytes, rounded so."""

    def sum_quantized(
        self, pieces: Flat, accum: Flat, *, world: int, stride: int, scale: float, add: bool
    ) -> float | Tensor:
        """`reduce` of such pieces, `stride` bytes apart."""

    def dequantize(self, pieces: Flat, values: Flat, *, world: int) -> None:
        """Reads them into `values`."""

    def first_difference(self, one: Tensor, other: Tensor) -> int | Tensor | None:
        """The first `LINE` bytes of two pieces of memory, equally long and a multiple of it, whose
        bits are not the same. None where all are, if that costs no wait; else a scalar tensor,
        which is behind the last then.
        """

    def take_writes(self, values: Flat, master: Flat) -> None:
        """Where `values` is not, bit for bit, what `master` is cast to, `master` becomes it."""

    def random_state(self) -> Tensor | None:
        """The state of this device's generator, where it has one beside the CPU's."""

    def set_random_state(self, state: Tensor) -> None:
        """Goes on where `random_state` was taken."""

    def moment(self) -> Any:
        """An event with timing, recorded on the current stream; None where the host's clock
        serves.
        """

    def memory(self) -> Figures | None:
        """How much of it is in use; None where torch does not count it."""

    def forget_peak(self) -> None:
        """The peak is counted anew from now on; nothing where torch does not count."""

    def name(self) -> str:
        """What torch calls its kind."""

    def peak(self, dtype: torch.dtype) -> float | None:
        """Floating-point operations a second in `dtype` at most; None where that is not known."""
