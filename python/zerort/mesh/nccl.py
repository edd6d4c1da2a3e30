"""An accelerator's tensors over its own library: NCCL, RCCL, XCCL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.mesh.comm import Work
from zerort.mesh.control import GlooControl
from zerort.mesh.data import Call, GroupComm, exchange

__all__ = ["NcclComm"]

# torch 2.13 renamed these and warns at every call of the old names; 2.11 has only the old ones.
# Resolved once.
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class NcclComm(GroupComm):
    """Tensors over NCCL or what takes its place: SUM in place, all-gather in place; 1/N is folded
    into the sum that follows.
    """

    # One group: two whose kernels are in flight together can deadlock.
    gradients = parameters = "data"
    window: int | None = 4  # NCCL runs one after the other; more only holds memory

    def __init__(self, control: GlooControl, device: torch.device, timeout: timedelta) -> None:
        super().__init__(control, device, dist.get_default_backend_for_device(device), timeout)

    def pieces(self, *, adds: bool) -> int:
        """One, unless it may not be added."""
        return 1 if adds else self.world

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Added on the way where one piece is to arrive, else exchanged."""
        name: str
        call: Call
        name, call = (
            ("reduce_scatter", partial(_on, _reduce_scatter, recv, send))
            if recv.numel() < send.numel()
            else ("all_to_all", exchange(recv, send))
        )
        return self._groups.work(name, [(self.gradients, call)])

    def all_gather(self, buffer: Tensor) -> Work:
        """In place: this rank's slice is its contribution."""
        own = buffer.chunk(self.world)[self.rank]
        call = partial(_on, _all_gather, buffer, own)
        return self._groups.work("all_gather", [(self.parameters, call)])


def _on(
    call: Callable[..., Any], into: Tensor, source: Tensor, group: dist.ProcessGroup
) -> dist.Work | None:
    work: dist.Work | None = call(into, source, group=group, async_op=True)
    return work
