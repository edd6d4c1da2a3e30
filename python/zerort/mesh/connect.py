"""From a job to the communicator that an engine uses."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from zerort.device import default_place
from zerort.errors import CommError
from zerort.mesh.comm import Comm
from zerort.mesh.gloo import GlooComm
from zerort.mesh.local import LocalComm
from zerort.mesh.nccl import NcclComm
from zerort.mesh.rendezvous import init_distributed

__all__ = ["connect"]


def connect(timeout: timedelta, device: torch.device | None = None) -> Comm:
    """The communicator of this job: adopts torch.distributed, initialises it under torchrun, or
    runs alone.

    `device` is where the model lives when it already lives on an accelerator. Raises `ConfigError`
    and `CommError`.
    """
    grouped = init_distributed(timeout=timeout)
    place = device or _default_device(grouped)
    if not grouped or dist.get_world_size() == 1:
        return LocalComm(place)
    kind: type[NcclComm] | type[GlooComm] = GlooComm if place.type == "cpu" else NcclComm
    try:
        return kind(place, timeout)
    except (RuntimeError, ValueError) as error:
        raise CommError(f"cannot make process groups on torch.distributed: {error}") from error


def _default_device(grouped: bool) -> torch.device:
    on_host = grouped and dist.get_backend() == "gloo"
    return torch.device("cpu") if on_host else default_place()
