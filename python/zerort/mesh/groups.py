"""What communicators over torch.distributed have alike: groups of the engine's own, small
collectives, and errors that name a rank.
"""

from __future__ import annotations

import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.board import board_of
from zerort.mesh.comm import Work
from zerort.mesh.last_words import leave_at_exit
from zerort.mesh.peers import Peer, Peers
from zerort.mesh.process import this_process

__all__ = ["GroupComm"]


class GroupComm:
    """Three groups of the engine's own: gradients, parameters and control never queue behind one
    another.
    """

    backend: str
    window: int | None
    chunks: int

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self._gradients, self._parameters, self._control = (
            self._new_group(timeout) for _ in range(3)
        )
        self._peers = Peers([], self.rank, "", None)
        self._meet()
        self._dropped = weakref.finalize(
            self, _let_workers_go, [self._gradients, self._parameters, self._control]
        )

    def _meet(self) -> None:
        """Learns who the others are; rank 0 names the engine, so that several leave notes side by
        side.
        """
        # A private name of torch's. Without the job's store, ranks that time out cannot be asked.
        store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
        board = None if store is None else board_of(store)
        me = Peer(this_process(), "" if board is None else leave_at_exit(board))
        met = self.gather_objects((me, uuid.uuid4().hex))
        self._peers = Peers([peer for peer, _ in met], self.rank, met[0][1], board)

    def _new_group(self, timeout: timedelta) -> dist.ProcessGroup:
        group = dist.new_group(backend=self.backend, timeout=timeout)
        if not isinstance(group, dist.ProcessGroup):
            raise CommError("this process is not a member of torch.distributed's default group")
        return group

    def all_reduce(self, values: Tensor) -> None:
        """On the control group; blocks the host where the device does, else the stream."""
        with self._named("all_reduce"):
            dist.all_reduce(values, group=self._control)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """On the control group."""
        with self._named("broadcast"):
            dist.broadcast(buffer, source, group=self._control)

    def gather_objects(self, value: Any) -> list[Any]:
        """Pickled, on the control group."""
        values: list[Any] = [None] * self.world
        with self._named("all_gather_object"):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def close(self) -> None:
        """Destroys the three groups, once; the job's own stays."""
        if not self._dropped.alive:
            return
        for group in (self._gradients, self._parameters, self._control):
            if dist.is_initialized():
                dist.destroy_process_group(group)
        # A group gives threads and descriptors back when nobody refers to it any more, and a
        # traceback may hold on to this object for long.
        del self._gradients, self._parameters, self._control, group
        self._dropped()

    def _work(
        self,
        operation: str,
        group: dist.ProcessGroup,
        calls: Sequence[Callable[[], dist.Work | None]],
    ) -> Work:
        """A collective on `group`, of one torch work for each of `calls`."""

        def named(call: Callable[[], dist.Work | None]) -> dist.Work | None:
            with self._named(operation):
                return call()

        return Work([partial(named, call) for call in calls], _counter(group))

    @contextmanager
    def _named(self, operation: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self.failure(operation, error) from error

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""
        if not dist.is_initialized():
            return CommError(
                f"rank {self.rank}: {what} failed because torch.distributed's process group was "
                "destroyed: call engine.destroy() first, and the process group after it"
            )
        return CommError(
            f"rank {self.rank}: {what} failed: {self._peers.explain(what)}. The cause as reported: "
            f"{error}"
        )


def _counter(group: dist.ProcessGroup) -> Callable[[], int]:
    """Says how many collectives `group` has been given; where its library does not count, 0."""
    count: Callable[[], int] = getattr(group, "_get_sequence_number_for_group", _uncounted)
    try:
        count()
    except RuntimeError:
        return _uncounted
    return count


def _uncounted() -> int:
    return 0


def _let_workers_go(groups: list[dist.ProcessGroup]) -> None:
    """Drops `groups` a moment after their last use, when an engine is collected or the interpreter
    ends.

    A worker of gloo's that still holds a tensor of the last collective needs the interpreter to let
    go of it, and the group's destructor waits for the worker while it holds the interpreter: seen
    to hang for ever with torch 2.6.
    """
    time.sleep(0.02)
    groups.clear()
