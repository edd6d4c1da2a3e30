"""Any accelerator that torch.accelerator drives: the host runs ahead, streams order the work.

Gradients are packed on the stream that made the last of them, sums run on a stream of their own,
and no method makes the host wait. Three things could go wrong without a word, and each has an order
of its own: a gradient is read after the stream that made it (`produced`), its memory is given back
to that stream only behind the read (`packing`), and a lane's packing and its sums take turns
(`Lane`). Everything names the device, so that another one may be the current one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zerort.device import quantize
from zerort.device.contract import LINE, Figures, Flat, Lane, Rounding
from zerort.device.host import AcceleratorHost
from zerort.device.peaks import peak_of

__all__ = ["Accelerator", "AcceleratorStreams", "current", "select", "why_not"]

# torch 2.8 renamed these and warns of the old names; 2.6 has only the old ones. Resolved once.
_device_index: Callable[[], int] = (
    getattr(torch.accelerator, "current_device_index", None) or torch.accelerator.current_device_idx
)
_set_device_index: Callable[[int], None] = (
    getattr(torch.accelerator, "set_device_index", None) or torch.accelerator.set_device_idx
)

UNFIT = {"mps": "it has no 64-bit floats, in which norms are summed"}
"""What torch.accelerator drives, but not with all that is needed here."""


def current() -> torch.device | None:
    """The current accelerator, if there is one that is supported."""
    place = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if place is None or place.type in UNFIT:
        return None
    return torch.device(place.type, _device_index())


def why_not(place: torch.device) -> str | None:
    """Why `place` cannot be used, None where it can."""
    if place.type in UNFIT:
        return UNFIT[place.type]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return "torch finds no accelerator on this machine"
    if accelerator.type != place.type:
        return f"the accelerator that torch drives here is {accelerator.type}"
    return None


def select(local_rank: int) -> None:
    """Makes the accelerator of this number the current one, modulo how many there are."""
    if current() is not None:
        _set_device_index(local_rank % torch.accelerator.device_count())


class Accelerator:
    """One accelerator and its memory."""

    blocks = False

    def __init__(self, place: torch.device) -> None:
        self.place = place if place.index is not None else torch.device(place.type, _device_index())

    def streams(self) -> AcceleratorStreams:
        """Streams of this device."""
        return AcceleratorStreams(self.place)

    def host(self, *, pinned: bool) -> AcceleratorHost:
        """Of this device."""
        return AcceleratorHost(self.place, partial(on_stream, self.place), pinned=pinned)

    def reduce(
        self, chunks: Flat, accum: Flat, *, world: int, stride: int, scale: float, add: bool
    ) -> float | Tensor:
        """In torch, on the current stream."""
        precise = torch.promote_types(accum.tensor.dtype, torch.float32)
        length = accum.tensor.numel()
        pieces = (chunks.tensor.narrow(0, rank * stride, length) for rank in range(world))
        total, *rest = (piece.to(precise) for piece in pieces)
        for piece in rest:
            total = total + piece
        if add:
            accum.tensor.add_(total, alpha=scale)
        else:
            accum.tensor.copy_(total * scale)
        return self.squared_norm(accum)

    def squared_norm(self, memory: Flat) -> float | Tensor:
        """A scalar tensor: reading it is for the vote."""
        norm: Tensor = torch.linalg.vector_norm(memory.tensor, dtype=torch.float64)
        return norm.square()

    def quantize(
        self, values: Flat, pieces: Flat, *, world: int, scale: float, rounding: Rounding
    ) -> None:
        """In torch, on the current stream."""
        quantize.quantize(
            values.tensor,
            pieces.tensor,
            world=world,
            scale=scale,
            seed=rounding.seed,
            before=None if rounding.before is None else rounding.before.tensor,
            after=None if rounding.after is None else rounding.after.tensor,
        )

    def sum_quantized(
        self, pieces: Flat, accum: Flat, *, world: int, stride: int, scale: float, add: bool
    ) -> float | Tensor:
        """In torch, on the current stream."""
        sent, sums = pieces.tensor, accum.tensor
        quantize.sum_quantized(sent, sums, world=world, stride=stride, scale=scale, add=add)
        return self.squared_norm(accum)

    def dequantize(self, pieces: Flat, values: Flat, *, world: int) -> None:
        """In torch, on the current stream."""
        quantize.dequantize(pieces.tensor, values.tensor, world=world)

    def first_difference(self, one: Tensor, other: Tensor) -> Tensor:
        """On the current stream; takes a quarter of the bytes of `one` meanwhile."""
        lines = one.nbytes // LINE
        if not lines:
            return torch.zeros((), dtype=torch.int64, device=one.device)
        words = one.view(torch.int64) != other.view(torch.int64)
        places = torch.arange(lines, device=one.device)
        return torch.where(words.view(lines, -1).any(1), places, lines).amin()

    def take_writes(self, values: Flat, master: Flat) -> None:
        """In torch, on the current stream."""
        now, kept = values.tensor, master.tensor
        cast = kept.to(now.dtype)
        # A cast may give a NaN another payload, so bits alone would take it from the master each
        # time.
        same = (cast.view(torch.int16) == now.view(torch.int16)) | (kept.isnan() & now.isnan())
        torch.where(same, kept, now, out=kept)

    def random_state(self) -> Tensor | None:
        """Of this device's default generator, on the CPU."""
        state: Tensor = self._module.get_rng_state(self.place)
        return state

    def set_random_state(self, state: Tensor) -> None:
        """Of this device's default generator."""
        self._module.set_rng_state(state, self.place)

    def moment(self) -> Any:
        """A `torch.Event` with timing, on this device's current stream."""
        event: Any = torch.Event(self.place, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.place))
        return event

    def memory(self) -> Figures | None:
        """As the caching allocator counts it."""
        module = self._module
        return Figures(module.memory_allocated(self.place), module.max_memory_allocated(self.place))

    def forget_peak(self) -> None:
        """Of the caching allocator."""
        self._module.reset_peak_memory_stats(self.place)

    def name(self) -> str:
        """As its driver calls it; its type where it has no name."""
        named = getattr(self._module, "get_device_name", None)
        return self.place.type if named is None else str(named(self.place))

    def peak(self, dtype: torch.dtype) -> float | None:
        """Of the table in `peaks`; fp32 as torch is set to multiply it now."""
        return peak_of(self.name(), dtype, tf32=torch.get_float32_matmul_precision() != "highest")

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.place)


class AcceleratorStreams:
    """A stream of sums beside the streams of the backward."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._sums: Any = torch.Stream(place)
        self._producers: dict[int, Any] = {}

    def lane(self) -> Lane:
        """A lane that nothing has used."""
        return Lane()

    def produced(self) -> None:
        """Keeps the stream; a backward usually has one, compiled graphs may have more."""
        stream = self._current()
        self._producers[stream.stream_id] = stream

    def make_room(self, lane: Lane) -> None:
        """The current stream waits for the last sum out of the lane."""
        if lane.free is not None:
            self._current().wait_event(lane.free)

    @contextmanager
    def packing(self, lane: Lane | None) -> Iterator[None]:
        """The current stream waits for the producers, and they for it.

        What made the gradients came after the last step, so the sums out of this lane will too.
        """
        packing = self._current()
        others = [stream for stream in self._producers.values() if stream != packing]
        for stream in others:
            packing.wait_stream(stream)
        try:
            yield
        finally:
            # Memory that is freed goes back to the stream it was allocated on, which could write
            # there before the copy has read it.
            for stream in others:
                stream.wait_stream(packing)
            if lane is not None:
                lane.packed = packing.record_event()

    def packed(self) -> None:
        """Forgets the producers: not earlier, for the first gradient of a direct backward comes
        before its pass begins.
        """
        self._producers.clear()

    @contextmanager
    def summing(self, lane: Lane) -> Iterator[None]:
        """The stream of sums becomes the current one, and the lane is marked behind it."""
        if lane.packed is not None:
            self._sums.wait_event(lane.packed)
        with on_stream(self._place, self._sums):
            try:
                yield
            finally:
                lane.free = self._sums.record_event()

    def join(self) -> None:
        """The current stream waits for the sums."""
        self._current().wait_stream(self._sums)

    def here(self) -> Callable[[], AbstractContextManager[None]]:
        """Of this device."""
        return partial(on_stream, self._place, self._current())

    def _current(self) -> Any:
        return torch.accelerator.current_stream(self._place)


@contextmanager
def on_stream(place: torch.device, stream: Any) -> Iterator[None]:
    """Within, `stream` is the current one of the device."""
    # Setting a stream makes its device the current one as well.
    index, before = _device_index(), torch.accelerator.current_stream(place)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        _set_device_index(index)
