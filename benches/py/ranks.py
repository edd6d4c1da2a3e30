"""Starts the ranks of a bench: processes of this machine, one compute thread each, in one process
group.

Two gloo ranks without a GPU, one NCCL rank per GPU with them. The environment looks as torchrun
would leave it, for contenders that read it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def default_world() -> int:
    """One rank per GPU, or two on CPU."""
    return torch.cuda.device_count() or 2


def run(world: int, main: Callable[..., None], *args: Any) -> None:
    """Calls `main(device, *args)` on every rank; raises what a rank raised."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_enter, args=(world, port, main, args), nprocs=world)


def _enter(
    rank: int, world: int, port: int, main: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        # More ranks than GPUs share them, which NCCL does from 2.30 on.
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        main(device, *args)
    finally:
        dist.destroy_process_group()
