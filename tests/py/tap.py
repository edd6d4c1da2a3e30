"""Listens to torch.distributed: every collective this process starts, on which group, and the bytes
it sends.

Every public function with a `group` argument is wrapped, so that a collective nobody thought of is
seen too; one whose bytes are not known here fails the test that used it. Bytes are what the
algorithm has to send: who relays a broadcast for whom is the transport's affair, and `carried`
reads what the sockets say of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch.distributed as dist
from torch import Tensor

_members_of = dist.get_process_group_ranks  # not one of those that are listened to


@dataclass(frozen=True)
class Call:
    """One collective, as this rank started it. `work` is torch's handle, None where the call
    blocked.
    """

    op: str
    on_default_group: bool
    tensors: tuple[Tensor, ...]
    sent: int
    work: Any
    ranks: tuple[int, ...]
    """Of its group."""


def _piece_for_every_peer(arguments: dict[str, Any], rank: int, world: int) -> int:
    splits, sent = arguments["input_split_sizes"], arguments["input"]
    if splits:
        return sent.itemsize * (sum(splits) - splits[rank])
    return sent.nbytes * (world - 1) // world


def _whole_to_every_peer(arguments: dict[str, Any], rank: int, world: int) -> int:
    here = arguments["src"] == dist.get_rank()
    return arguments["tensor"].nbytes * (world - 1) if here else 0


def _scatter_then_gather(arguments: dict[str, Any], rank: int, world: int) -> int:
    return 2 * arguments["tensor"].nbytes * (world - 1) // world


SENT: dict[str, Callable[[dict[str, Any], int, int], int]] = {
    "all_to_all_single": _piece_for_every_peer,
    "broadcast": _whole_to_every_peer,
    "all_reduce": _scatter_then_gather,
}
NOT_COLLECTIVES = {"get_rank", "get_world_size", "get_backend", "destroy_process_group"}


@contextmanager
def tapped() -> Iterator[list[Call]]:
    """Within, the list grows by one `Call` for every collective of this process."""
    calls: list[Call] = []
    originals = {name: getattr(dist, name) for name in _collectives()}
    for name, original in originals.items():
        setattr(dist, name, _listening(name, original, calls))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _collectives() -> list[str]:
    # `type`, because `isinstance` would ask a deprecated object for its class, which warns.
    functions = ((name, value) for name, value in vars(dist).items() if type(value) is FunctionType)
    return [
        name
        for name, function in functions
        if not name.startswith("_")
        and name not in NOT_COLLECTIVES
        and "group" in inspect.signature(function).parameters
    ]


def _listening(name: str, original: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def listening(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        work = original(*args, **kwargs)
        tensors = tuple(value for value in arguments.values() if isinstance(value, Tensor))
        default = arguments["group"] in (None, dist.group.WORLD)
        members = tuple(_members_of(arguments["group"] or dist.group.WORLD))
        place = members.index(dist.get_rank()) if dist.get_rank() in members else 0
        sent = SENT[name](arguments, place, len(members)) if name in SENT else -1
        calls.append(Call(name, default, tensors, sent, work, members))
        return work

    return listening


_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info


def carried() -> int:
    """Bytes that peers have acknowledged on all TCP connections of this process, since each was
    made, once no more are: an acknowledgement may be held back for 200 ms.
    """
    found, before = _acknowledged(), -1
    while found != before:
        time.sleep(0.25)
        found, before = _acknowledged(), found
    return found


def _acknowledged() -> int:
    total = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            if (
                connection.family in (socket.AF_INET, socket.AF_INET6)
                and connection.type == socket.SOCK_STREAM
            ):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
                total += (
                    struct.unpack_from("Q", info, _BYTES_ACKED)[0]
                    if len(info) >= _BYTES_ACKED + 8
                    else 0
                )
    return total
