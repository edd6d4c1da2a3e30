"""How the processes of a job find one another: torch.distributed's default group, from torchrun's
environment.

What it guarantees: a job that was started again never meets what an earlier start of it has left in
the store. torchrun's agent keeps one store over all restarts, and addresses of processes that are
gone would otherwise be connected to. Torchrun's own count of restarts does not tell the starts
apart: it stays the same when a host leaves or joins, and hosts may count differently. So the ranks
agree on a name for each start, in the store itself:

    rank r   sets hello/r to a word of its own, and waits for an answer to that word
    rank 0   answers each word that it finds with the name of this start, until all have confirmed
    rank r   confirms under that name

A word that an earlier start has left is answered too, but never confirmed.

What it does not do: it leaves a default group alone that the user has made. Where rank 0 holds the
store itself, every start has a new one, and needs no name.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from zerort.device import default_place, select
from zerort.errors import CommError, ConfigError

__all__ = ["init_distributed", "is_whole_job"]

_POLL = 0.01  # seconds between two looks at who has come


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta = timedelta(minutes=5),
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: object = None,
    rank: int = -1,
    world_size: int = -1,
) -> bool:
    """Initialises torch.distributed, unless that was done or there is nothing to do it from.

    `dist_backend` is "nccl" or "gloo", by default what suits the device. The job is found by
    torchrun's environment or, with `init_method`, at a URL of torch's (tcp://HOST:PORT or
    file:///PATH); `rank` and `world_size` win over the environment's, and `distributed_port` stands
    in where MASTER_PORT is not set. With `dist_init_required=False` a group that is there is used
    and none is made. Without effect: `auto_mpi_discovery` (there is none), `verbose`, `config`.

    Returns whether a process group exists afterwards. Raises `ConfigError` when a rank is known and
    the rest is not, and `CommError` when a rank does not come within `timeout`. Mirrors
    deepspeed.init_distributed, in the order of its parameters.
    """
    if dist.is_initialized():
        return True
    place = _place(rank, world_size, distributed_port, init_method)
    if dist_init_required is False or place is None:
        return False
    # More ranks than GPUs share them, which NCCL allows from 2.30 on when it is told to.
    select(int(os.environ.get("LOCAL_RANK", "0")))
    chosen = dist_backend or dist.get_default_backend_for_device(default_place())
    if init_method is not None:
        rank, world_size = place
        dist.init_process_group(chosen, init_method, timeout, world_size=world_size, rank=rank)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _join_in_agents_store(chosen, timeout)
    else:
        dist.init_process_group(chosen, timeout=timeout)
    return True


def _place(rank: int, world: int, port: int, url: str | None) -> tuple[int, int] | None:
    """Rank and world size; None for one process that was not started as part of a job. Without a
    URL the environment has what was given, for torch looks there.

    Raises `ConfigError` when a rank is known and the rest is not.
    """
    given = {"RANK": rank, "WORLD_SIZE": world}
    known = {name: str(number) for name, number in given.items() if number >= 0}
    environment = {**os.environ, **known}
    if "RANK" not in environment:
        if url is not None:
            raise ConfigError(
                f"init_distributed(init_method={url!r}) needs rank and world_size too: give them, "
                "or start the job with torchrun and leave init_method out"
            )
        return None
    needed = ["WORLD_SIZE", *(["MASTER_ADDR"] if url is None else [])]
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"RANK={environment['RANK']} is set but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: start the job with torchrun, or unset "
            "RANK to run one process"
        )
    if url is None:
        os.environ.update(known)
        os.environ["MASTER_PORT"] = environment.get("MASTER_PORT") or str(port)
    return int(environment["RANK"]), int(environment["WORLD_SIZE"])


def is_whole_job(group: dist.ProcessGroup) -> bool:
    """Whether a process group of the user's has all ranks."""
    return dist.get_world_size(group) == dist.get_world_size()


def _join_in_agents_store(backend: str, timeout: timedelta) -> None:
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    start = PrefixStore(_name_of_this_start(store, rank, world, timeout), store)
    dist.init_process_group(backend, store=start, rank=rank, world_size=world, timeout=timeout)


def _name_of_this_start(store: Store, rank: int, world: int, timeout: timedelta) -> str:
    """The same on all ranks, and another at every start."""
    own = f"zerort/{uuid.uuid4().hex}"
    if rank == 0:
        _answer(store, own, world, timeout)
        return own
    store.set(f"zerort/hello/{rank}", own)
    try:
        store.wait([f"{own}/answer"], timeout)
    except RuntimeError as error:
        raise CommError(
            f"rank {rank}: rank 0 did not come to the start of the job within "
            f"{timeout.total_seconds():g} s, or its store at {_address()} has gone: {error}"
        ) from error
    name: str = store.get(f"{own}/answer").decode()
    store.set(f"{name}/here/{rank}", "")
    return name


def _answer(store: Store, name: str, world: int, timeout: timedelta) -> None:
    """Tells every other rank `name`; returns once all have it."""
    deadline = time.monotonic() + timeout.total_seconds()
    awaited, answered = set(range(1, world)), dict[int, bytes]()
    while awaited:
        for rank in sorted(awaited):
            if store.check([f"{name}/here/{rank}"]):
                awaited.remove(rank)
            elif store.check([f"zerort/hello/{rank}"]):
                word = store.get(f"zerort/hello/{rank}")
                if word != answered.get(rank):
                    store.set(f"{word.decode()}/answer", name)
                    answered[rank] = word
        if awaited and time.monotonic() > deadline:
            late = ", ".join(map(str, sorted(awaited)[:8]))
            raise CommError(
                f"rank 0: of {world} ranks {len(awaited)} did not come to the start of the job "
                f"within {timeout.total_seconds():g} s, the first of them {late}: look whether "
                f"they were started, and whether their hosts reach {_address()}"
            )
        time.sleep(_POLL if awaited else 0)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
