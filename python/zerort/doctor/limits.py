"""What the system allows: shared memory, limits of a process, memory and CPUs of its container."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from zerort.doctor.finding import Finding, Machine, note, ok, problem

__all__ = ["cpus", "limits", "memory", "shared_memory"]

_SHM_LEAST, _SHM_USUAL = 16 << 20, 1 << 30
_FILES_LEAST, _FILES_USUAL = 256, 4096
_LOCKED_USUAL = 64 << 20


def shared_memory(machine: Machine) -> Iterator[Finding]:
    """/dev/shm: workers of data loaders and NCCL's ranks of one host meet there."""
    path = machine.root / "dev/shm"
    if not path.is_dir():
        yield note("/dev/shm", "there is none: data loaders with workers need it")
        return
    total, free = machine.space(path)
    text = f"{_size(free)} of {_size(total)} free"
    remedy = "docker run --shm-size=8g (or --ipc=host); in Kubernetes an emptyDir of medium Memory"
    if free < _SHM_LEAST:
        yield problem("/dev/shm", f"{text}: NCCL and data loaders' workers fail", remedy)
    elif total < _SHM_USUAL:
        yield note("/dev/shm", f"{text}: data loaders with many workers need more", remedy)
    else:
        yield ok("/dev/shm", text)


def limits(machine: Machine) -> Iterator[Finding]:
    """Open files and locked memory."""
    yield from _files(machine.limits("RLIMIT_NOFILE"))
    yield from _locked(machine.limits("RLIMIT_MEMLOCK"))


def _files(found: tuple[int, int] | None) -> Iterator[Finding]:
    if found is None:
        return
    soft, hard = found
    if soft < 0 or soft >= _FILES_USUAL:
        yield ok("ulimit -n", "unlimited" if soft < 0 else str(soft))
        return
    wanted = _FILES_USUAL if hard < 0 else min(hard, 16 * _FILES_USUAL)
    remedy = f"ulimit -n {wanted}" if wanted > soft else "raise nofile in /etc/security/limits.conf"
    text = f"{soft} open files: a rank has some for each peer and each worker"
    kind = problem if soft < _FILES_LEAST else note
    yield kind("ulimit -n", text, remedy)


def _locked(found: tuple[int, int] | None) -> Iterator[Finding]:
    if found is None:
        return
    soft = found[0]
    if soft < 0 or soft >= _LOCKED_USUAL:
        yield ok("ulimit -l", "unlimited" if soft < 0 else _size(soft))
        return
    yield note(
        "ulimit -l",
        f"{_size(soft)} of locked memory: InfiniBand needs more",
        "ulimit -l unlimited, or docker run --ulimit memlock=-1",
    )


def memory(machine: Machine) -> Iterator[Finding]:
    """Of the host, and of the control group that this process is in."""
    total = _of_host(machine, "MemTotal")
    free = _of_host(machine, "MemAvailable")
    if total is None or free is None:
        yield note("memory", "this system does not say")
        return
    text = f"{_size(free)} of {_size(total)} available"
    group = _group(machine)
    most = _limit(machine, group)
    if most is not None and most < total:
        used = int(machine.text(f"{group}/memory.current") or 0)
        total, free = most, max(0, min(free, most - used))
        text = f"{_size(free)} of {_size(total)}, the limit of this container"
    if free < total / 10:
        yield problem("memory", text, "end what has the rest, or give the container more")
    else:
        yield ok("memory", text)
    killed = _counted(machine.text(f"{group}/memory.events"), "oom_kill")
    if killed:
        yield note(
            "memory",
            f"the kernel has killed {killed} process{'es' if killed > 1 else ''} of this container "
            "for want of memory",
            "`zerort estimate` says what a rank needs",
        )


def _of_host(machine: Machine, key: str) -> int | None:
    for line in (machine.text("proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) << 10
    return None


def _group(machine: Machine) -> str:
    """The folder of this process's control group (version 2); a container sees its own as root."""
    for line in (machine.text("proc/self/cgroup") or "").splitlines():
        if line.startswith("0::"):
            folder = f"sys/fs/cgroup/{line[3:].strip('/')}".rstrip("/")
            if (machine.root / folder / "memory.max").is_file():
                return folder
    return "sys/fs/cgroup"


def _limit(machine: Machine, group: str) -> int | None:
    text = machine.text(f"{group}/memory.max") or machine.text(
        "sys/fs/cgroup/memory/memory.limit_in_bytes"
    )
    return int(text) if text and text.isdigit() else None


def _counted(text: str | None, key: str) -> int:
    rows = dict(line.split() for line in (text or "").splitlines() if len(line.split()) == 2)
    return int(rows.get(key, 0))


def cpus(machine: Machine) -> Iterator[Finding]:
    """Those that this process may use, and how many threads its ranks start on them."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield from crowded(machine, mine, torch.get_num_threads())


def crowded(machine: Machine, mine: int, threads: int) -> Iterator[Finding]:
    """Of `mine` CPUs, with `threads` of torch's in each rank of this host."""
    group = _group(machine)
    quota, _, period = (machine.text(f"{group}/cpu.max") or "max").partition(" ")
    usable = float(mine)
    text = f"{mine}"
    if quota.isdigit() and period.isdigit():
        usable = min(usable, int(quota) / int(period))
        text = f"{usable:g} of {mine}, the limit of this container" if usable < mine else text
    ranks = machine.number("LOCAL_WORLD_SIZE") or 1
    if ranks * threads > 2 * usable:
        yield note(
            "CPUs",
            f"{text}, for {ranks * threads} threads of {ranks} rank{'s' if ranks > 1 else ''}",
            f"OMP_NUM_THREADS={max(1, int(usable / ranks))}",
        )
    else:
        yield ok("CPUs", f"{text}; {threads} threads a rank")


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
