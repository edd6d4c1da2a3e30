"""Which ranks sit together, and how a model state is laid over them.

A *host* is where ranks can share memory: one machine since its start, in one set of namespaces, and
of one agent of torchrun's where that says so. Containers on one machine are several hosts, whatever
they are called. What torchrun gives as LOCAL_WORLD_SIZE cuts a place further.

An arrangement lists copies of the model state, in each the hosts, in each the ranks. What it
guarantees: copies have equally many hosts and hosts equally many ranks, each in ascending order, so
that the ranks of one place do too; where ranks do not sit like that, all of a copy count as one
host. It follows from what all ranks know, so that all choose alike. What it does not do: it makes
no connection.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zerort.errors import ConfigError

__all__ = ["Arrangement", "Copies", "Hierarchy", "Seat", "arrange", "this_seat"]

Copies = tuple[tuple[tuple[int, ...], ...], ...]
"""Copies of the model state, by host, by rank."""

_NAMESPACES = ("pid", "ipc", "net")


@dataclass(frozen=True)
class Hierarchy:
    """What is asked for.

    `choice` is "auto", "flat", or how many consecutive ranks are as one host; `sums_alike` whether
    hops inside hosts win nothing by themselves, because a library adds on the way; `shard_size`
    how many consecutive ranks hold one copy of the model state, all where None; `kept_size` how
    many keep its parameters together between updates, which are as one host then.
    """

    choice: str | int = "auto"
    sums_alike: bool = False
    shard_size: int | None = None
    kept_size: int | None = None


@dataclass(frozen=True)
class Seat:
    """Where a rank sits; equal for ranks that can share memory."""

    host: str
    place: str
    """The machine's start and its namespaces; empty where the system does not say."""
    agent: str
    """Of torchrun, as that counts them; empty without."""
    local: int
    """Ranks that torchrun has started there; 0 where it does not say."""


@dataclass(frozen=True)
class Arrangement:
    """Where a job's ranks are, for its model state."""

    copies: Copies
    remark: str | None = None
    """Why hosts do not count, where that has a reason that a user can do something about."""

    @property
    def hosts(self) -> int:
        """Of a copy, as far as they count."""
        return len(self.copies[0])

    def by_shard(self, rank: int) -> tuple[int, ...]:
        """The ranks of this one's copy, in the order of the shards: by place, then by host."""
        copy = next(copy for copy in self.copies if any(rank in host for host in copy))
        return tuple(rank for place in zip(*copy, strict=True) for rank in place)

    def groups(self) -> dict[str, list[list[int]]]:
        """Their parts, by the name of the group."""
        copies = [sorted(rank for host in copy for rank in host) for copy in self.copies]
        alike = zip(*(self.by_shard(copy[0]) for copy in copies), strict=True)
        return {
            "shard": copies,
            "replica": [list(ranks) for ranks in alike],
            "inner": [list(host) for copy in self.copies for host in copy],
            "outer": [list(p) for copy in self.copies for p in zip(*copy, strict=True)],
        }


def this_seat(environment: Mapping[str, str] = os.environ) -> Seat:
    """The calling process's."""
    local = environment.get("LOCAL_WORLD_SIZE", "")
    return Seat(
        socket.gethostname(),
        _place(),
        environment.get("GROUP_RANK", ""),
        int(local) if local.isdigit() else 0,
    )


def arrange(seats: Sequence[Seat], wanted: Hierarchy) -> Arrangement:
    """By what is wanted, for ranks that sit there. Raises `ConfigError` for numbers that do not
    divide the ranks.
    """
    world = len(seats)
    size = _divides("zero_optimization.mics_shard_size", wanted.shard_size or world, world, "ranks")
    parts = [range(start, start + size) for start in range(0, world, size)]
    flat = Arrangement(tuple((tuple(part),) for part in parts))
    inner = _given_size(wanted, size)
    if inner is not None:
        nested = [[part[at : at + inner] for at in range(0, size, inner)] for part in parts]
        copies = tuple(tuple(map(tuple, copy)) for copy in nested)
        return Arrangement(copies) if 1 < inner < size else flat
    if wanted.choice == "flat" or wanted.sums_alike:
        return flat
    copies = tuple(_hosts(seats, part) for part in parts)
    if max(len(copy) for copy in copies) == 1 or max(map(len, sum(copies, ()))) == 1:
        return flat  # there is one host, or one rank on each
    remark = _odd(copies)
    return Arrangement(copies) if remark is None else Arrangement(flat.copies, remark)


def _given_size(wanted: Hierarchy, size: int) -> int | None:
    """How many consecutive ranks are as one host, of `size` that hold one model state; None where
    nobody has said it.
    """
    choice, kept, of = wanted.choice, wanted.kept_size, "ranks that hold one model state"
    inner = None
    if isinstance(choice, int):
        inner = _divides("zerort.hierarchy.inner", choice, size, of)
    if kept is None:
        return inner
    _divides("zero_optimization.zero_hpz_partition_size", kept, size, of)
    if kept == size and inner is None:
        return None  # a gather from all of them is one among these
    if choice == "flat" or inner not in (None, kept):
        asked = f'"{choice}"' if inner is None else f'{{"inner": {inner}}}'
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size is {kept}, and zerort.hierarchy is "
            f"{asked}: ranks keep what a gather between such groups has brought. Leave "
            f'zerort.hierarchy out, which is {{"inner": {kept}}} then, or zero_hpz_partition_size'
        )
    return kept


def _divides(key: str, number: int, whole: int, what: str) -> int:
    if number < 1 or whole % number:
        fitting = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise ConfigError(
            f"{key} is {number}, which does not divide the {whole} {what}: give one of {fitting}, "
            "or leave it out"
        )
    return number


def _hosts(seats: Sequence[Seat], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """By the first rank of each."""
    found: dict[Seat, list[int]] = {}
    for rank in ranks:
        found.setdefault(seats[rank], []).append(rank)
    hosts: list[tuple[int, ...]] = []
    for seat, members in found.items():
        fits = 0 < seat.local < len(members) and len(members) % seat.local == 0
        each = seat.local if fits else len(members)
        hosts += [tuple(members[at : at + each]) for at in range(0, len(members), each)]
    return tuple(sorted(hosts))


def _odd(copies: Copies) -> str | None:
    """Why these are not in the shape of an arrangement."""
    sizes = [[len(host) for host in copy] for copy in copies]
    if len({len(copy) for copy in sizes}) > 1 or len({n for copy in sizes for n in copy}) > 1:
        shape = "; ".join(" and ".join(map(str, copy)) for copy in sizes)
        return f"hosts have different numbers of ranks ({shape})"
    for copy in copies:
        for place in zip(*copy, strict=True):
            if list(place) != sorted(place):
                return f"ranks {place[0]} and {place[1]} are not numbered in the order of the hosts"
    return None


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES)])
    except OSError:
        return ""
