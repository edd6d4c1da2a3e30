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

from hosts import hosts, why_not


def default_world() -> int:
    """One rank per GPU, or two on CPU."""
    return torch.cuda.device_count() or 2


def run(world: int, main: Callable[..., None], *args: Any) -> None:
    """Calls `main(device, *args)` on every rank; raises what a rank raised."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_enter, args=(world, port, main, args), nprocs=world)


def between_hosts(
    world: int, megabits: int, command: list[str], shown: Callable[[str], None]
) -> None:
    """Runs `command` once in each of `world` hosts (`hosts.py`) behind links of so many Mbit a
    second, as a rank each; `shown` gets rank 0's lines. Raises `RuntimeError`.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(f"no hosts: {reason}")
    with hosts(world, megabits * 1_000_000) as places:
        facts = {"WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_PORT": "29518"}
        facts |= {"MASTER_ADDR": places[0].address, "OMP_NUM_THREADS": "1"}
        running = [
            place.start(command, facts | {"RANK": str(rank)}) for rank, place in enumerate(places)
        ]
        try:
            assert running[0].stdout is not None
            for line in running[0].stdout:
                shown(line.rstrip("\n"))
            ended = [rank.wait(timeout=60) for rank in running]
        finally:
            for rank in running:
                rank.kill()
                rank.wait()
    if any(ended):
        raise RuntimeError(f"ranks ended with {ended}")


def enter(main: Callable[..., None], *args: Any) -> None:
    """Is the rank that the environment says, without a GPU, and calls `main(device, *args)`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        main(torch.device("cpu"), *args)
    finally:
        dist.destroy_process_group()


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
