"""Memory that is elsewhere for a while: how it is brought there, and back.

A *carrier* copies flat memory from one place to another; whoever has tensors or `Memory` over the
old place makes them over the new one. What it guarantees: the values are the same to the bit, and
nothing that was moved keeps the old memory. What it does not do: it does not know what is moved,
nor when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zerort.device import Host, Mark

__all__ = ["Carrier", "FromHost", "ToHost", "shift"]

Carrier = Callable[[Tensor], Tensor]
"""Takes contiguous memory (numel,) and returns a copy of it in another place."""


class ToHost:
    """From the device."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._last: Mark | None = None

    def __call__(self, there: Tensor) -> Tensor:
        """Behind what is enqueued; in page-locked memory nobody waits."""
        here = self._host.zeros(there.numel(), there.dtype)
        self._last = self._host.receive(here, there)
        return here

    def wait(self) -> None:
        """The host stands still until all copies are over."""
        if self._last is not None:
            self._last.wait()


class FromHost:
    """To the device."""

    def __init__(self, host: Host, place: torch.device) -> None:
        self._host, self._place = host, place
        self._last: Mark | None = None

    def __call__(self, here: Tensor) -> Tensor:
        """Behind what is enqueued."""
        there = torch.empty(here.numel(), dtype=here.dtype, device=self._place)
        self._last = self._host.send(there, here)
        return there

    def wait(self) -> None:
        """The host stands still until all copies are over."""
        if self._last is not None:
            self._last.wait()


@torch.no_grad()
def shift(tensors: Sequence[Tensor], carry: Carrier) -> None:
    """Makes `tensors`, as the objects that they are, views of memory that `carry` brings. What
    shared memory goes on to share it, at the same offsets.
    """
    groups: dict[int, list[Tensor]] = {}
    # a view keeps its base, and that the old memory
    bases = [t._base for t in tensors if t._base is not None]
    for tensor in {id(t): t for t in (*tensors, *bases)}.values():
        groups.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    for group in groups.values():
        if not group[0].untyped_storage().nbytes():
            continue
        flat = carry(_all_of(min(group, key=lambda tensor: tensor.itemsize)))
        for tensor in group:
            offset = tensor.storage_offset()
            # its own attribute, for views of a base do not follow it
            tensor.data = flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), offset)


def _all_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor's memory (numel,)."""
    numel = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.detach().as_strided((numel,), (1,), 0)
