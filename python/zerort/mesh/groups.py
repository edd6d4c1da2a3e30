"""Process groups of the engine's own: made over explicit ranks, given back once.

What it guarantees: nothing of the engine's is ever sent on a group of the user's, so a collective
of the user's cannot pair with one of ours; a failure names ranks as the job numbers them; and
groups, threads and descriptors are given back by `close`, or when the owner is collected. What it
does not do: it starts no collective.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count

import torch.distributed as dist

from zerort.errors import CommError, ConfigError
from zerort.mesh.comm import Handles, Work
from zerort.mesh.peers import Peers

__all__ = ["Call", "Groups", "Members", "Partition"]

Call = Callable[[dist.ProcessGroup], "dist.Work | None"]
"""Hands a collective to torch's library, on a group."""
Partition = tuple[tuple[int, ...], ...]
"""The job's ranks in parts, each in ascending order."""


@dataclass(frozen=True)
class Members:
    """One part of a partition of the job: the one that this rank is in."""

    parts: Partition
    job_rank: int

    @classmethod
    def of(cls, name: str, parts: Sequence[Sequence[int]], job_rank: int, world: int) -> Members:
        """Raises `ConfigError` unless every rank of the job is in one part."""
        given = tuple(tuple(part) for part in parts)
        if sorted(rank for part in given for rank in part) != list(range(world)):
            raise ConfigError(
                f"mesh group {name!r}: its parts {[*map(list, given)]} do not hold each of the "
                f"{world} ranks of the job once"
            )
        if any(list(part) != sorted(part) for part in given):
            raise ConfigError(
                f"mesh group {name!r}: list the ranks of each part in ascending order, which is "
                "the order that torch.distributed gives them"
            )
        return cls(given, job_rank)

    @classmethod
    def everyone(cls, job_rank: int, world: int) -> Members:
        """The job as one part."""
        return cls((tuple(range(world)),), job_rank)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of this part, as the job numbers them."""
        return next(part for part in self.parts if self.job_rank in part)

    @property
    def rank(self) -> int:
        """This rank's place among them, from 0."""
        return self.ranks.index(self.job_rank)


class Groups:
    """One rank's process groups over the same members, by the name of what they carry."""

    def __init__(self, members: Members, peers: Peers) -> None:
        self.members = members
        self.peers = peers
        self._under_way: UnderWay = {}
        self._numbers = count()
        self._patience = timedelta(0)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._quiet = Quiet()
        self.failed = False
        """Whether a collective on one of these groups has failed."""
        self._given_back = weakref.finalize(self, _drop, self._groups, self._under_way, self._quiet)
        self._given_back.atexit = False
        weakref.finalize(self, _linger, self._groups)

    def open(self, name: str, backend: str, timeout: timedelta) -> None:
        """Makes a group for every part; all ranks of the job call it, in the same order."""
        self._patience = timeout
        for part in self.members.parts:
            if len(part) == 1:
                continue
            group = dist.new_group(list(part), backend=backend, timeout=timeout)
            if part == self.members.ranks:
                if not isinstance(group, dist.ProcessGroup):
                    raise CommError(
                        "this process is not a member of torch.distributed's default group"
                    )
                self._groups[name] = group

    def open_later(self, name: str, backend: str) -> None:
        """As `open`, behind the first ones, and as patient as they are. Raises `CommError` where a
        rank does not come.
        """
        with self.named("making a process group"):
            self.open(name, backend, self._patience)

    def __contains__(self, name: str) -> bool:
        """Whether there is a group of that name."""
        return name in self._groups

    def __getitem__(self, name: str) -> dist.ProcessGroup:
        """Raises `CommError` after `close`."""
        group = self._groups.get(name)
        if group is None:
            raise CommError(
                f"rank {self.members.job_rank}: its process groups have been given back by "
                "engine.destroy(), or by an initialize that failed"
            )
        return group

    def set_timeout(self, timeout: timedelta) -> None:
        """For all collectives from now on."""
        self._patience = timeout
        for group in self._groups.values():
            _set_timeout(timeout, group)

    def close(self, *, waits: bool = True) -> None:
        """Waits for what is under way, at most as long as the time-out, unless it is not to, and
        gives the groups back. A second call does nothing.

        Where it is not waited for, an accelerator's library is told to give up: its kernels would
        wait for those of a lost peer for ever.
        """
        if not waits:
            _abort(self._groups, self._under_way)
        deadline = time.monotonic() + (self._patience.total_seconds() if waits else 0.0)
        while _busy(self._under_way) and self._groups and time.monotonic() < deadline:
            time.sleep(_POLL)
        self._given_back()

    def work(self, operation: str, calls: Sequence[tuple[str, Call]]) -> Work:
        """A collective of one torch work for each of `calls`: the name of a group, and what is to
        be called with it.
        """

        def named(call: Call, group: dist.ProcessGroup) -> dist.Work | None:
            with self.named(operation):
                return call(group)

        groups = {name: self[name] for name, _ in calls}
        counters = [_counter(group) for group in groups.values()]
        key = next(self._numbers)
        work = Work(
            [partial(named, call, groups[name]) for name, call in calls],
            lambda: sum(counter() for counter in counters),
            partial(self._waited, key),
        )
        self._under_way[key] = work.handles
        return work

    def _waited(self, key: int) -> None:
        self._under_way.pop(key, None)
        self._quiet.begin()

    @contextmanager
    def named(self, operation: str) -> Iterator[None]:
        """Within, what torch raises becomes a `CommError` that names ranks."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, CommError):
                raise
            raise self.failure(operation, error) from error
        finally:
            self._quiet.begin()

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""
        self.failed = True
        rank = self.members.job_rank
        if not dist.is_initialized():
            return CommError(
                f"rank {rank}: {what} failed because torch.distributed's process group was "
                "destroyed: call engine.destroy() first, and the process group after it"
            )
        return CommError(
            f"rank {rank}: {what} failed: {self.peers.explain(what)}. The cause as reported: "
            f"{error}"
        )


_LINGER = 0.02
"""Seconds in which a worker lets go of a collective's tensors."""
_POLL = 0.005


class Quiet:
    """Since when no worker has anything to let go of, as far as this thread has seen."""

    def __init__(self) -> None:
        self._since = 0.0

    def begin(self) -> None:
        """A collective has been started or waited for."""
        self._since = time.monotonic()

    def reach(self) -> None:
        """Sleeps until it has been so for long enough."""
        rest = self._since + _LINGER - time.monotonic()
        if rest > 0:
            time.sleep(rest)


UnderWay = dict[int, Handles]
"""Collectives that have not been waited for yet, numbered."""

_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def _busy(under_way: UnderWay) -> bool:
    works = [work for handles in list(under_way.values()) for work in list(handles.values())]
    return any(work is not None and not work.is_completed() for work in works)


def _counter(group: dist.ProcessGroup) -> Callable[[], int]:
    """Says how many collectives `group` has been given; where its library does not count, 0."""
    counter: Callable[[], int] = getattr(group, "_get_sequence_number_for_group", _uncounted)
    try:
        counter()
    except RuntimeError:
        return _uncounted
    return counter


def _uncounted() -> int:
    return 0


def _drop(groups: dict[str, dist.ProcessGroup], under_way: UnderWay, quiet: Quiet) -> None:
    """Gives groups back whose owner has been closed or collected.

    A group's destructor waits for its workers, while it holds the interpreter. So it must not run
    while a collective is under way (a peer may take its time, and nothing else would run
    meanwhile), nor right after the last one: a worker of gloo's that still holds a tensor needs the
    interpreter to let go of it, which was seen to hang for ever with torch 2.6.
    """
    if _busy(under_way):
        waiting = (groups, under_way, quiet)
        threading.Thread(target=_wait_and_destroy, args=waiting, daemon=True).start()
        return
    if under_way:  # complete, and nobody has waited for it
        quiet.begin()
    _destroy(groups, quiet)


def _wait_and_destroy(
    groups: dict[str, dist.ProcessGroup], under_way: UnderWay, quiet: Quiet
) -> None:
    while _busy(under_way):
        time.sleep(_POLL)
    quiet.begin()
    _destroy(groups, quiet)


def _linger(groups: dict[str, dist.ProcessGroup]) -> None:
    """When the interpreter ends, and takes groups down that have not been closed."""
    if groups:
        time.sleep(_LINGER)


def _destroy(groups: dict[str, dist.ProcessGroup], quiet: Quiet) -> None:
    quiet.reach()
    while groups:
        _, group = groups.popitem()
        # Raised where the user has destroyed torch.distributed, and ours with it.
        with suppress(AssertionError, ValueError):
            dist.destroy_process_group(group)


def _abort(groups: dict[str, dist.ProcessGroup], under_way: UnderWay) -> None:
    """Ends the groups of an accelerator's library at once; gloo's end by themselves."""
    for name, group in list(groups.items()):
        with suppress(AssertionError, ValueError):  # the user has destroyed torch.distributed
            if dist.get_backend(group) == "gloo":
                continue
            del groups[name]
            under_way.clear()
            dist.distributed_c10d._abort_process_group(group)
