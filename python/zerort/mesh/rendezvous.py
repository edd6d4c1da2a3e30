"""How the processes of a job find one another: torch.distributed's default group, from torchrun's
environment.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from zerort.errors import ConfigError

__all__ = ["init_distributed"]


def init_distributed(
    dist_backend: str | None = None, *, timeout: timedelta = timedelta(minutes=5)
) -> bool:
    """Initialises torch.distributed from torchrun's environment, unless that was done or there is
    none.

    `dist_backend` is "nccl" or "gloo", by default what suits the device. Returns whether a process
    group exists afterwards. Raises `ConfigError` when RANK is set and the rest is not. Mirrors
    deepspeed.init_distributed.
    """
    if dist.is_initialized():
        return True
    if "RANK" not in os.environ:
        return False
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)
    ]
    if missing:
        raise ConfigError(
            f"RANK={os.environ['RANK']} is set but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: start the job with torchrun, or unset "
            "RANK to run one process"
        )
    if torch.cuda.is_available():
        # More ranks than GPUs share them, which NCCL allows from 2.30 on when it is told to.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    chosen = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(chosen, timeout=timeout)
    return True
