"""`deepspeed.comm`: torch.distributed by the same names, and what a process alone is answered."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from zerort.device import default_place
from zerort.mesh import init_distributed

__all__ = [
    "barrier",
    "configure",
    "get_local_rank",
    "get_rank",
    "get_world_group",
    "get_world_size",
    "init_distributed",
    "initialize_mesh_device",
    "is_available",
    "is_initialized",
    "log_summary",
]

is_available, is_initialized = dist.is_available, dist.is_initialized


def get_rank(group: Any = None) -> int:
    """This rank's number; 0 for a process without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """This rank's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_world_group() -> Any:
    """The group of all ranks; None without one."""
    return dist.group.WORLD if dist.is_initialized() else None


def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None, **_: Any) -> Any:
    """Waits for all ranks; nothing without a process group."""
    if dist.is_initialized():
        return dist.barrier(group, async_op, device_ids)
    return None


def initialize_mesh_device(mesh_shape: Any, mesh_dim_names: Any) -> Any:
    """torch's device mesh, of that shape."""
    init_distributed()
    return init_device_mesh(default_place().type, mesh_shape, mesh_dim_names=mesh_dim_names)


def configure(*args: Any, **kwargs: Any) -> None:
    """Nothing: an engine's `comms_logger` says what is logged of its own collectives."""


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> Any:
    """Nothing of these calls: `engine.communication_summary()` has the engine's own."""
    return {} if return_dict else None
