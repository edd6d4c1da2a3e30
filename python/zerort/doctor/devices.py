"""Accelerators, and whether they reach each other's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zerort.device.gpus import GPU, gpus
from zerort.doctor.finding import Finding, Machine, note, ok, problem

__all__ = ["devices"]

_SHARING = (2, 30)
"""The NCCL that lets ranks share a GPU."""


def devices(machine: Machine, found: Any = gpus) -> Iterator[Finding]:
    """What torch sees, with the memory that is free."""
    if not found.is_available():
        yield from _without(machine)
        return
    count = found.device_count()
    for index in range(count):
        free, total = found.mem_get_info(index)
        text = f"{GPU}:{index} {found.get_device_name(index)}, {_gib(free)} of {_gib(total)} free"
        if free < total / 2:
            yield note("devices", text, "another process has the rest: nvidia-smi says which")
        else:
            yield ok("devices", text)
    local = machine.number("LOCAL_WORLD_SIZE") or 1
    if local > count:
        yield note(
            "devices",
            f"{local} ranks of this host share {count}: they are slow, and NCCL before "
            f"{'.'.join(map(str, _SHARING))} refuses it",
            f"torchrun --nproc_per_node={count}",
        )
    if count > 1:
        yield _peers(found, count)


def _without(machine: Machine) -> Iterator[Finding]:
    hidden = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if (machine.root / "proc/driver/nvidia").exists() and hidden is None:
        yield problem(
            "devices",
            f"this host has an NVIDIA driver, and torch {torch.__version__} sees no GPU",
            "install torch's build for CUDA, or a newer driver: nvidia-smi says which CUDA it has",
        )
    elif hidden is not None:
        yield note("devices", f"no GPU is visible: CUDA_VISIBLE_DEVICES={hidden!r}")
    else:
        yield ok("devices", "none: ranks train on the CPU, over gloo")


def _peers(found: Any, count: int) -> Finding:
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [f"{a}-{b}" for a, b in pairs if not found.can_device_access_peer(a, b)]
    if not apart:
        return ok("peer access", f"between all {count}")
    return note(
        "peer access",
        f"none between {', '.join(apart[:6])}{' ...' if len(apart) > 6 else ''}: what they send "
        "goes through the host",
        "`nvidia-smi topo -m` shows how they are connected; in a virtual machine ACS may forbid it",
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
