"""The CPU: everything happens in the order of the program, and sums are the core's kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from zerort import _core
from zerort.device.contract import LINE, Figures, Flat, Host, Lane, Rounding

__all__ = ["Cpu"]

_NOTHING = nullcontext()


class InOrder:
    """Streams where there are none."""

    def lane(self) -> Lane:
        """Never marked."""
        return Lane()

    def produced(self) -> None:
        """In order already."""

    def make_room(self, lane: Lane) -> None:
        """In order already."""

    def packing(self, lane: Lane | None) -> AbstractContextManager[object]:
        """The thread itself."""
        return _NOTHING

    def packed(self) -> None:
        """In order already."""

    def summing(self, lane: Lane) -> AbstractContextManager[object]:
        """The thread itself."""
        return _NOTHING

    def join(self) -> None:
        """In order already."""

    def here(self) -> Callable[[], AbstractContextManager[object]]:
        """The thread itself."""
        return lambda: _NOTHING


class Cpu:
    """The CPU and its memory."""

    place = torch.device("cpu")
    blocks = True

    def streams(self) -> InOrder:
        """The order of the program."""
        return InOrder()

    def host(self, *, pinned: bool) -> Host | None:
        """None: it is the host."""
        return None

    def reduce(
        self, chunks: Flat, accum: Flat, *, world: int, stride: int, scale: float, add: bool
    ) -> float | Tensor:
        """One fused pass in the core."""
        if accum.tensor.dtype in (torch.float32, torch.float64):
            return _core.reduce(
                chunks.buffer, accum.buffer, world=world, scale=scale, add=add, stride=stride
            )
        # Sums are taken in fp32 all the same; only what is kept between passes is narrower.
        exact = torch.empty(accum.tensor.numel(), dtype=torch.float32)
        _core.reduce(
            chunks.buffer,
            _core.Buffer(exact),
            world=world,
            scale=scale,
            add=False,
            stride=stride,
        )
        accum.tensor.copy_(exact + accum.tensor if add else exact)
        return self.squared_norm(accum)

    def squared_norm(self, memory: Flat) -> float | Tensor:
        """In the core."""
        return _core.squared_norm(memory.buffer)

    def quantize(
        self, values: Flat, pieces: Flat, *, world: int, scale: float, rounding: Rounding
    ) -> None:
        """In the core."""
        _core.quantize(
            values.buffer,
            pieces.buffer,
            world=world,
            scale=scale,
            seed=rounding.seed,
            before=None if rounding.before is None else rounding.before.buffer,
            after=None if rounding.after is None else rounding.after.buffer,
        )

    def sum_quantized(
        self, pieces: Flat, accum: Flat, *, world: int, stride: int, scale: float, add: bool
    ) -> float:
        """One fused pass in the core."""
        if accum.tensor.dtype == torch.float32:
            return _core.sum_quantized(
                pieces.buffer, accum.buffer, world=world, stride=stride, scale=scale, add=add
            )
        exact = torch.empty(accum.tensor.numel(), dtype=torch.float32)
        whole = _core.Buffer(exact)
        _core.sum_quantized(
            pieces.buffer, whole, world=world, stride=stride, scale=scale, add=False
        )
        accum.tensor.copy_(exact + accum.tensor if add else exact)
        return _core.squared_norm(accum.buffer)

    def dequantize(self, pieces: Flat, values: Flat, *, world: int) -> None:
        """In the core."""
        if values.tensor.dtype == torch.float32:
            _core.dequantize(pieces.buffer, values.buffer, world=world)
            return
        exact = torch.empty(values.tensor.numel(), dtype=torch.float32)
        _core.dequantize(pieces.buffer, _core.Buffer(exact), world=world)
        values.tensor.copy_(exact)

    def first_difference(self, one: Tensor, other: Tensor) -> int | None:
        """Where nothing differs, eight bytes at a time."""
        one, other = one.view(torch.int64), other.view(torch.int64)
        if torch.equal(one, other):
            return None
        return int((one != other).nonzero()[0]) * one.itemsize // LINE

    def take_writes(self, values: Flat, master: Flat) -> None:
        """In the core."""
        _core.take_writes(values.buffer, master.buffer)

    def random_state(self) -> Tensor | None:
        """None: torch's own generator is the CPU's."""
        return None

    def set_random_state(self, state: Tensor) -> None:
        """Nothing to set."""

    def moment(self) -> None:
        """The host's clock serves."""

    def memory(self) -> Figures | None:
        """None: torch does not count the CPU's."""
        return None

    def forget_peak(self) -> None:
        """Nothing is counted."""

    def name(self) -> str:
        """`cpu`, whichever it is."""
        return "cpu"

    def peak(self, dtype: torch.dtype) -> float | None:
        """None: it depends on cores and clock."""
        return None
