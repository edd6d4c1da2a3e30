"""Small facts between ranks, over gloo on the host whatever the device is.

What it guarantees: a wait for a peer ends with the time-out and an error that names a rank, which a
GPU's own library does not offer, and no stream of a GPU is involved.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.board import Board, board_of
from zerort.mesh.comm import Control
from zerort.mesh.groups import Groups, Members
from zerort.mesh.last_words import leave_at_exit
from zerort.mesh.local import LocalControl
from zerort.mesh.ordered import OrderedControl
from zerort.mesh.peers import Peer, Peers
from zerort.mesh.process import this_process
from zerort.mesh.rendezvous import init_distributed
from zerort.mesh.roster import Roster

__all__ = ["GlooControl", "beside", "meet", "open_control", "open_groups"]

_CONTROL = "control"
_PAUSE = 0.0005  # seconds


class GlooControl:
    """A control group of its own, so that nothing queues behind gradients or parameters."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.rank, self.world = groups.members.rank, len(groups.members.ranks)
        self.idle: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """Rank 0 has given it when the ranks met."""
        return self.groups.peers.name

    def all_reduce(self, values: Tensor) -> None:
        """Sums in place; blocks the host, unless there is something to do meanwhile."""
        idle = self.idle
        with self.groups.named("all_reduce"):
            work = dist.all_reduce(values, group=self.groups[_CONTROL], async_op=idle is not None)
            while work is not None and idle is not None and not work.is_completed():
                idle()
                time.sleep(_PAUSE)
            if work is not None:
                work.wait()

    def broadcast(self, values: Tensor, source: int = 0) -> None:
        """In place; blocks the host."""
        with self.groups.named("broadcast"):
            rank = self.groups.members.ranks[source]
            dist.broadcast(values, rank, group=self.groups[_CONTROL])

    def gather_objects(self, value: Any) -> list[Any]:
        """Pickled; blocks the host."""
        values: list[Any] = [None] * self.world
        with self.groups.named("all_gather_object"):
            dist.all_gather_object(values, value, group=self.groups[_CONTROL])
        return values

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""
        return self.groups.failure(what, error)

    def set_timeout(self, timeout: timedelta) -> None:
        """For what starts from now on."""
        self.groups.set_timeout(timeout)

    def close(self, *, waits: bool = True) -> None:
        """Gives the group back, once."""
        self.groups.close(waits=waits)


def meet(timeout: timedelta) -> Control:
    """The control group of this job: adopts torch.distributed, initialises it under torchrun, or
    stands for one process.

    The ranks tell one another who they are, so that each can name any that is lost. Raises
    `ConfigError` for an environment that is not complete and `CommError`.
    """
    if not init_distributed(timeout=timeout) or dist.get_world_size() == 1:
        return LocalControl()
    members, board = Members.everyone(dist.get_rank(), dist.get_world_size()), _board()
    roster = Roster(board, dist.get_world_size())
    roster.sign(members.job_rank)
    patience, since = timeout.total_seconds(), time.monotonic()
    try:
        control = open_control(members, Peers({}, members.job_rank, "", None), timeout)
    except CommError as error:
        # one that fails at once has waited for no rank
        waited = time.monotonic() - since >= 0.9 * patience
        missing = ", ".join(map(str, roster.missing())) if waited else ""
        if not missing:
            raise
        raise CommError(
            f"rank {members.job_rank}: of {dist.get_world_size()} ranks these did not come to the "
            f"start within {patience:g} s: {missing}. Every rank calls "
            "zerort.initialize and zerort.zero.Init as often as the others, in the same order; "
            "what a missing one does or waits for before that is to be looked at"
        ) from error
    try:
        control.groups.peers = _introduced(control, board)
    except BaseException:
        control.close()
        raise
    return control


def open_control(members: Members, known: Peers, timeout: timedelta) -> GlooControl:
    """A control group over each part of `members`. Raises as `open_groups`."""
    return GlooControl(open_groups(_CONTROL, members, known, timeout))


def beside(control: Control, timeout: timedelta) -> Control:
    """A control group of the same ranks, for a thread of its own: nothing on it waits for what is
    on `control`. All ranks of the job call it, in the same order. Raises as `open_groups`.
    """
    if isinstance(control, OrderedControl):
        return control.over(beside(control.control, timeout))
    if not isinstance(control, GlooControl):
        return LocalControl()
    return open_control(control.groups.members, control.groups.peers, timeout)


def open_groups(name: str, members: Members, known: Peers, timeout: timedelta) -> Groups:
    """Groups of gloo's of that name, one over each part of `members`. Raises `CommError` naming the
    variable that tells gloo which interface to use.
    """
    groups = Groups(members, known)
    try:
        groups.open(name, "gloo", timeout)
    except (RuntimeError, ValueError) as error:
        groups.close()
        raise CommError(
            f"rank {members.job_rank}: cannot make the {name} group, which is gloo's on every "
            f"device: {error}. If no rank has died, gloo may have found no network interface that "
            "the other ranks reach: name one in GLOO_SOCKET_IFNAME, for example the one of "
            "NCCL_SOCKET_IFNAME"
        ) from error
    return groups


def _board() -> Board | None:
    """In the job's store, whose name in torch is private. Without it, ranks that time out cannot be
    asked.
    """
    store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
    return None if store is None else board_of(store)


def _introduced(control: GlooControl, board: Board | None) -> Peers:
    """Learns who the others are; rank 0 names the engine, so that several leave messages side by
    side.
    """
    me = Peer(this_process(), "" if board is None else leave_at_exit(board))
    met = control.gather_objects((me, uuid.uuid4().hex))
    everyone = {rank: peer for rank, (peer, _) in enumerate(met)}
    return Peers(everyone, control.rank, met[0][1], board)
