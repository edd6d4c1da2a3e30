"""The collectives that an engine uses, tried between ranks: whether each gives what it should, and
how fast.

All ranks call it. What it does not do: its rates are of one size, and are no measurement to plan
by; `zerort tune` makes one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zerort.device import device_for
from zerort.doctor.finding import Finding, note, ok, problem
from zerort.mesh import Comm, Mesh, Piece
from zerort.mesh.control import GlooControl
from zerort.mesh.segments import PAGE, Unshared, share

__all__ = ["clocks", "shared", "tried"]

_BYTES = 8 << 20
_TIMES = 4
_ROUNDS = 7
_APART = 1.0
"""Seconds."""


def tried(mesh: Mesh) -> Iterator[Finding]:
    """One finding each. Raises `CommError` where a rank does not come."""
    comm = mesh.shard
    for name, of in _TRIALS.items():
        run, right = of(comm)
        took = min(_seconds(comm, run) for _ in range(_TIMES))
        wrong = comm.control.gather_objects(right())
        if all(wrong):
            rate = _BYTES / took / 1e9
            speed = f"{rate:.3g} GB/s of a bucket" if name in _LARGE else f"{took * 1e6:.0f} us"
            yield ok(f"{name}", f"{speed}, {comm.world} ranks on {comm.device.type}")
        else:
            ranks = ", ".join(str(rank) for rank, fine in enumerate(wrong) if not fine)
            yield problem(
                name,
                f"a wrong result on rank {ranks}",
                "look at memory and cables; with NCCL try NCCL_P2P_DISABLE=1 and another version",
            )


def shared(mesh: Mesh) -> Iterator[Finding]:
    """Whether CPU ranks of one host can share memory, as an engine's do by themselves. Raises
    `CommError` where a rank does not come.
    """
    control = mesh.control
    if not isinstance(control, GlooControl) or not device_for(mesh.shard.device).blocks:
        return
    if control.groups.peers.apart(control.groups.members.ranks):
        return
    try:
        share(control, 1, PAGE)
    except Unshared as error:
        yield note(
            "shared memory",
            f"{error}; gradients and parameters go over gloo",
            "start the ranks of a host as one user in one container, with memory to spare",
        )
    else:
        yield ok("shared memory", f"{control.world} ranks share it")


def clocks(mesh: Mesh, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """How far the ranks' clocks are apart, by the end of an all-reduce, which all see at once. Rank
    0's is the reference.
    """
    control = mesh.control
    best: list[float] = []
    for _ in range(_ROUNDS):
        control.all_reduce(torch.zeros(1))
        rows = torch.zeros(control.world, dtype=torch.float64)
        rows[control.rank] = now()
        control.all_reduce(rows)
        apart = (rows - rows[0]).tolist()
        best = min(best or apart, apart, key=lambda found: max(map(abs, found)))
    yield _of_clocks(best)


def _of_clocks(apart: list[float]) -> Finding:
    most = max(apart, key=abs)
    text = f"at most {abs(most) * 1e3:.1f} ms apart (rank {apart.index(most)} from rank 0)"
    if abs(most) < _APART:
        return ok("clocks", text)
    return problem(
        "clocks",
        text,
        "let the hosts follow one clock (chrony, ntpd): logs, traces and files have its times",
    )


def _seconds(comm: Comm, run: Callable[[], None]) -> float:
    comm.control.all_reduce(torch.zeros(1))
    begun = time.perf_counter()
    run()
    event = device_for(comm.device).moment()
    if event is not None:
        event.synchronize()
    return time.perf_counter() - begun


Trial = tuple[Callable[[], None], Callable[[], bool]]
"""Runs it; says whether what came is right."""


def _reduce_scatter(comm: Comm) -> Trial:
    shard = _shard(comm)
    comm.scatter_memory([Piece(shard, torch.float32, adds=True)])  # the groups that a step has
    send = torch.ones(comm.world * shard, device=comm.device) * (comm.rank + 1)
    recv = torch.zeros(comm.pieces(adds=True) * shard, device=comm.device)
    total = comm.world * (comm.world + 1) / 2

    def run() -> None:
        comm.reduce_scatter(recv, send).start().wait()

    return run, lambda: _is(recv.view(-1, shard).sum(0), total)


def _all_gather(comm: Comm) -> Trial:
    shard = _shard(comm)
    buffer = torch.zeros(comm.world * shard, device=comm.device)
    buffer[comm.rank * shard :][:shard] = comm.rank + 1
    memory = comm.gather_memory(buffer.nbytes // comm.world)

    def run() -> None:
        memory.make(buffer, lost=False).start().wait()

    return run, lambda: _in_order(comm, buffer)


def _all_to_all(comm: Comm) -> Trial:
    shard = _shard(comm)
    send = torch.ones(comm.world * shard, device=comm.device) * (comm.rank + 1)
    recv, each = torch.zeros_like(send), [shard] * comm.world

    def run() -> None:
        comm.all_to_all(recv, send, each, each).start().wait()

    return run, lambda: _in_order(comm, recv)


def _broadcast(comm: Comm) -> Trial:
    buffer = torch.full((_BYTES // 4,), float(comm.rank), device=comm.device)
    return lambda: comm.broadcast(buffer), lambda: _is(buffer, 0)


def _vote(comm: Comm) -> Trial:
    row = torch.zeros(comm.world, 5, dtype=torch.float64)

    def run() -> None:
        row.zero_()
        row[comm.rank] = comm.rank + 1
        comm.control.all_reduce(row)

    return run, lambda: all(_is(row[rank], rank + 1) for rank in range(comm.world))


_TRIALS: dict[str, Callable[[Comm], Trial]] = {
    "reduce-scatter": _reduce_scatter,
    "all-gather": _all_gather,
    "all-to-all": _all_to_all,
    "broadcast": _broadcast,
    "vote": _vote,
}
_LARGE = _TRIALS.keys() - {"vote"}


def _shard(comm: Comm) -> int:
    return max(1, _BYTES // (4 * comm.world))


def _in_order(comm: Comm, buffer: Tensor) -> bool:
    return all(_is(part, rank + 1) for rank, part in enumerate(buffer.chunk(comm.world)))


def _is(values: Tensor, number: float) -> bool:
    return bool((values == number).all())
