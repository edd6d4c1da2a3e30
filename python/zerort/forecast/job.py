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

    @property
    def window(self) -> int | None:
        """Buckets that the ranks' communicator has in flight; None is all."""
        return NcclComm.window if self.on_accelerator and self.world > 1 else None

    @property
    def pieces(self) -> int:
        """That arrive of a shard."""
        return 1 if self.on_accelerator else self.world

    def shares(self, settings: Config) -> bool:
        """Whether ranks of one host share the memory of buckets in flight."""
        able = self.world > 1 and not self.on_accelerator
        return able and settings.zerort.transport != "gloo"
