"""Memory that a save beside training copies the engine's state into, so that the next step may
change it.

What it guarantees: what `copy` has returned shares no memory with the engine, whichever device that
is on, and is as it was when it was called; the memory is kept from one save to the next. What it
does not do: it knows no ranks, and takes no memory that it is not told to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zerort import _core
from zerort.checkpoint.tensors import CODES, Stored, size_of
from zerort.device import Host, Mark, device_for
from zerort.platforms import HERE

__all__ = ["Copies", "bytes_of"]

_PAGE = 4096
_PIECE = 1 << 22  # bytes touched at a time
_LARGE = 1 << 20  # bytes from which on a call of the core's costs less than it saves
_LEAST = 1 << 20  # bytes of a block, so that small growth makes few


def bytes_of(tensors: Sequence[Stored]) -> int:
    """Of all elements."""
    return sum(size_of(CODES[stored.dtype], stored.shape) for stored in tensors)


class Copies:
    """The host's memory in some blocks, page-locked where the model is on an accelerator. More is
    got beside what there is, so that no page has to be given twice.
    """

    def __init__(self, place: torch.device) -> None:
        self._host: Host | None = device_for(place).host(pinned=True)
        self._blocks: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """That it has."""
        return sum(block.numel() for block in self._blocks)

    def reserve(self, nbytes: int) -> None:
        """Has at least `nbytes` from now on. Raises `MemoryError` and `RuntimeError` for want of
        memory.
        """
        more = nbytes - self.nbytes
        if more <= 0:
            return
        more = max(more, _LEAST)
        # what is made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            if self._host is None:
                try:
                    memory = HERE.memory(more)
                except OSError as error:
                    raise MemoryError(f"{more} bytes for copies: {error}") from error
                self._blocks.append(torch.frombuffer(memory, dtype=torch.uint8))
            else:
                self._blocks.append(self._host.zeros(more, torch.uint8))

    def touch(self, rest: Callable[[], None]) -> None:
        """Has the system give all pages now, so that `copy` does not wait for them. `rest` is
        called again and again between.
        """
        for block in self._blocks if self._host is None else ():
            pages: Any = block.numpy()  # whose assignments start no threads and let others run
            for start in range(0, len(pages), _PIECE):
                pages[start : start + _PIECE : _PAGE] = 0
                rest()

    def copy(self, tensors: Sequence[Stored]) -> list[Stored]:
        """The same in this memory, where `reserve` has made room. Waits for the device."""
        copied, last, at = [], None, 0
        for stored in tensors:
            pieces = []
            for piece in stored.pieces:
                rest = _as_bytes(piece)
                while rest.numel():
                    here = self._room(at, rest.numel())
                    last = self._take(here, rest[: here.numel()]) or last
                    pieces.append(here)
                    at, rest = at + here.numel(), rest[here.numel() :]
            copied.append(replace(stored, pieces=pieces))
        if last is not None:
            last.wait()
        return copied

    def _room(self, at: int, most: int) -> Tensor:
        """At most so many bytes from byte `at` of all blocks on, as many as there are in one."""
        for block in self._blocks:
            if at < block.numel():
                return block.narrow(0, at, min(most, block.numel() - at))
            at -= block.numel()
        raise AssertionError("reserve() comes first")

    def _take(self, here: Tensor, there: Tensor) -> Mark | None:
        if self._host is not None and there.device.type != "cpu":
            return self._host.receive(here, there)
        if here.numel() < _LARGE or there.device.type != "cpu":
            here.copy_(there)
        else:
            source, target = _core.Buffer(there), _core.Buffer(here)
            _core.copy(source, target, threads=torch.get_num_threads())
        return None


def _as_bytes(piece: Tensor) -> Tensor:
    """Its elements in order, on its device."""
    flat = piece.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)
