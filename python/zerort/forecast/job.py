"""Who will train."""

from __future__ import annotations

from dataclasses import dataclass

from zerort.config import Config
from zerort.mesh.nccl import NcclComm

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """So many ranks, each with an accelerator of its own or on the CPU."""

    world: int = 1
    on_accelerator: bool = True
    trained_only: bool = False
    """The optimizer holds parameters that require grad alone."""
    hosts: int = 1
    """Over which the ranks are spread, in their order."""

    @property
    def window(self) -> int | None:
        """Buckets that the ranks' communicator has in flight; None is all."""
        return NcclComm.window if self.on_accelerator and self.world > 1 else None

    def exchanges(self, *, adds: bool) -> bool:
        """Whether a piece arrives from each rank, because none is added on the way."""
        return not self.on_accelerator or not adds

    def shares(self, settings: Config) -> bool:
        """Whether ranks of one host share the memory of buckets in flight."""
        able = self.world > 1 and not self.on_accelerator
        return able and settings.zerort.transport != "gloo"
