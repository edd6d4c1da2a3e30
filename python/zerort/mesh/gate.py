"""Where ranks meet before a collective of the caller's own, which is on the caller's group.

A rank that waits in such a collective hears nothing of one that has failed and whose process goes
on: the collective has no partner and no end. So all ranks come to the gate first, and one that
fails comes too, without waiting, with its reason:

    rank 0   log ── gate: all_reduce(0) ····· 1 ── all_reduce(words) ── CommError: KeyError
    rank 1   raises ──── all_reduce(1), all_reduce(words) ── takes part in what the peers do

What it guarantees: ranks go through the gate together and for the same collective, or all that come
raise what is wrong; the gate has a process group of its own, so that nothing is left on the
caller's. A rank that has gone is named by its last words. What it does not do: a rank that is
interrupted while it waits here has come, for those that come later.
"""

from __future__ import annotations

import time
import zlib
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.comm import Control, Work
from zerort.mesh.control import GlooControl, open_groups
from zerort.mesh.groups import Groups

__all__ = ["Gate"]

_NAME = "gate"
_LONGEST = 600
"""Bytes of what a rank says."""
_NAMED = 8  # ranks that a message has room for
_CALLS = 1 << 20
"""Numbers of calls; sums of their squares fit into 64 bits for millions of ranks."""
_COMES, _FAILED = "comes to", "has failed:"
_CONSEQUENCE = f"{_FAILED} {CommError.__name__}: "
_PAUSES = (0.0002, 0.005)
"""Seconds between two looks whether all have come: the first, and the longest."""


class Gate:
    """Of the ranks of `control`, which all make it together. Nobody waits longer than `timeout`."""

    def __init__(self, control: Control, timeout: timedelta) -> None:
        self._groups: Groups | None = None
        if isinstance(control, GlooControl):
            known = control.groups
            self._groups = open_groups(_NAME, known.members, known.peers, timeout)

    def pass_through(self, call: str) -> None:
        """Returns when all ranks are here, before `call`.

        Raises `CommError` with the reason of each that has failed, where another collective is
        coming on some rank, and where one has gone or does not come in time.
        """
        if self._groups is None:
            return
        ranks = self._groups.members.ranks
        with self._groups.named(call):
            met = _state(zlib.crc32(call.encode()) % _CALLS)
            _wait(self._sum(met))
            failed, first, second = met.tolist()
            if not failed and first * first == len(ranks) * second:
                return
            words = self._words(f"{_COMES} {call}")
            _wait(self._sum(words))
        listed = "; ".join(f"rank {ranks[i]} {said}" for i, said in _telling(words))
        raise CommError(f"rank {self._groups.members.job_rank}: {call} failed: {listed}")

    def fail(self, reason: str) -> None:
        """Whoever comes or has come hears `reason`. Waits for nobody; what this rank does here
        next comes behind it.
        """
        if self._groups is not None:
            self._sum(_state(failed=1))
            self._sum(self._words(f"{_FAILED} {reason}"))

    def close(self) -> None:
        """Gives the group back, behind what `fail` has left on it. A second call does nothing."""
        if self._groups is not None:
            self._groups.close(waits=False)
            self._groups = None

    def _words(self, mine: str) -> Tensor:
        """A row for each rank, with this rank's in its own."""
        assert self._groups is not None
        members = self._groups.members
        rows = torch.zeros(len(members.ranks), _LONGEST, dtype=torch.uint8)
        text = mine.encode()[:_LONGEST].decode(errors="ignore").encode()
        rows[members.rank, : len(text)] = torch.tensor([*text], dtype=torch.uint8)
        return rows

    def _sum(self, values: Tensor) -> Work:
        assert self._groups is not None

        def call(group: dist.ProcessGroup) -> dist.Work | None:
            return dist.all_reduce(values, group=group, async_op=True)

        return self._groups.work("all_reduce", [(_NAME, call)]).start()


def _state(call: int = 0, *, failed: int = 0) -> Tensor:
    """What is added up: sums of a number and of its square tell whether it is the same on all."""
    return torch.tensor([failed, call, call * call])


def _telling(words: Tensor) -> list[tuple[int, str]]:
    """Those of ranks that have failed, first by themselves, else of all."""
    said = list(enumerate(bytes(row.tolist()).rstrip(b"\0").decode() for row in words))
    failed = [(rank, each) for rank, each in said if each.startswith(_FAILED)]
    first = [(rank, each) for rank, each in failed if not each.startswith(_CONSEQUENCE)]
    return (first or failed or said)[:_NAMED]


def _wait(work: Work) -> None:
    """Waits for it where Ctrl-C is heard, which it is not within torch."""
    pause, longest = _PAUSES
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, longest)
    work.wait()
