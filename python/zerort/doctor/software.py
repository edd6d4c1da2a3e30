"""What is installed: Python, torch, back ends, NCCL, and who answers to DeepSpeed's name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from zerort.device.gpus import gpus
from zerort.doctor.finding import Finding, Machine, note, ok, problem
from zerort.doctor.names import findings

__all__ = ["back_ends", "nccl", "versions"]


def versions(machine: Machine) -> Iterator[Finding]:
    """Of zerort, Python, torch, and what people come from."""
    rows, refused = findings()
    for name, text in rows:
        if refused and name == "import deepspeed":
            yield problem(
                name, text, "uninstall that DeepSpeed, or let zerort shadow it (docs/migration.md)"
            )
        else:
            yield ok(name, text)


def back_ends(machine: Machine) -> Iterator[Finding]:
    """Those that this torch was built with, and the one that a job will use."""
    dist = torch.distributed
    if not dist.is_available():
        yield problem("back ends", "this torch has no torch.distributed", "install another torch")
        return
    asked = (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
    found = [name for name, there in asked if there]
    if "gloo" not in found:
        yield problem(
            "back ends", f"{found or 'none'}: ranks vote over gloo", "install a torch with gloo"
        )
    elif gpus.is_available() and "nccl" not in found:
        yield problem(
            "back ends", "gloo alone, beside GPUs", "install torch's build for CUDA or ROCm"
        )
    else:
        yield ok("back ends", ", ".join(found))


def nccl(machine: Machine) -> Iterator[Finding]:
    """The one that is loaded, which may be another than torch was built with."""
    if not torch.distributed.is_nccl_available():
        yield ok("NCCL", "none, and none is needed on the CPU")
        return
    yield from compared(_built_with(), _loaded(machine))


def compared(built: tuple[int, ...], loaded: tuple[int, ...] | None) -> Iterator[Finding]:
    """What torch was built with, and what is loaded of it."""
    if loaded is None:
        yield ok("NCCL", f"{_dotted(built)}, linked into torch")
    elif loaded == built:
        yield ok("NCCL", _dotted(loaded))
    elif loaded[:2] < built[:2]:
        yield problem(
            "NCCL",
            f"{_dotted(loaded)} is loaded, and torch was built with {_dotted(built)}",
            "another libnccl.so.2 comes first: look at LD_LIBRARY_PATH and LD_PRELOAD",
        )
    else:
        yield note(
            "NCCL", f"{_dotted(loaded)} is loaded, and torch was built with {_dotted(built)}"
        )


def _built_with() -> tuple[int, ...]:
    found = gpus.nccl.version()  # type: ignore[no-untyped-call]
    return tuple(found) if isinstance(found, tuple) else parts(int(found))


def _loaded(machine: Machine) -> tuple[int, ...] | None:
    """By asking the library that this process has mapped."""
    lines = (machine.text("proc/self/maps") or "").splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libnccl.so" in line}
    for path in sorted(paths):
        number = ctypes.c_int(0)
        if ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number)) == 0:
            return parts(number.value)
    return None


def parts(number: int) -> tuple[int, ...]:
    """22904 is 2.29.4, and before 2.9 it was 2804 for 2.8.4."""
    major = 10000 if number >= 10000 else 1000
    return number // major, number % major // 100, number % 100


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
