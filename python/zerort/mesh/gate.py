"""Where ranks meet before a collective of the caller's own, which is on the caller's group.

A rank that waits in such a collective hears nothing of one that has failed and whose process goes
on: the collective has no partner and no end. So all ranks come to the gate first, and one that
fails comes too, without waiting, with its reason:

    rank 0   log ── gate: all_reduce(0) ····· 1 ── all_reduce(reasons) ── CommError: KeyError
    rank 1   raises ──── all_reduce(1), all_reduce(reasons) ── takes part in what the peers do

What it guarantees: ranks go through the gate together, or all that come raise the same reason; the
gate has a process group of its own, so that nothing is left on the caller's. A rank that has gone
is named by its last words. What it does not do: a rank that is interrupted while it waits here has
come, for those that come later.
"""

from __future__ import annotations

import time
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
"""Bytes of a reason."""
_CONSEQUENCE = f"{CommError.__name__}: "
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

        Raises `CommError` with the reason of each that has failed, and where one has gone or does
        not come in time.
        """
        if self._groups is None:
            return
        with self._groups.named(call):
            failed = torch.zeros(1)
            _wait(self._sum(failed))
            if not failed.item():
                return
            reasons = self._rows()
            _wait(self._sum(reasons))
        listed = "; ".join(f"rank {rank} has failed: {why}" for rank, why in _first(reasons))
        raise CommError(f"rank {self._groups.members.job_rank}: {call} failed: {listed}")

    def fail(self, reason: str) -> None:
        """Whoever comes or has come hears `reason`. Waits for nobody; what this rank does here
        next comes behind it.
        """
        if self._groups is not None:
            rows, text = self._rows(), reason.encode()[:_LONGEST].decode(errors="ignore").encode()
            rows[self._groups.members.rank, : len(text)] = torch.tensor([*text], dtype=torch.uint8)
            self._sum(torch.ones(1))
            self._sum(rows)

    def close(self) -> None:
        """Gives the group back, behind what `fail` has left on it. A second call does nothing."""
        if self._groups is not None:
            self._groups.close(waits=False)
            self._groups = None

    def _rows(self) -> Tensor:
        assert self._groups is not None
        return torch.zeros(len(self._groups.members.ranks), _LONGEST, dtype=torch.uint8)

    def _sum(self, values: Tensor) -> Work:
        groups = self._groups
        assert groups is not None

        def start() -> dist.Work | None:
            return dist.all_reduce(values, group=groups[_NAME], async_op=True)

        return groups.work("all_reduce", _NAME, [start]).start()


def _first(reasons: Tensor) -> list[tuple[int, str]]:
    """Those of ranks that have not failed because of another."""
    read = enumerate(bytes(row.tolist()).rstrip(b"\0").decode() for row in reasons)
    found = [(rank, why) for rank, why in read if why]
    return [(rank, why) for rank, why in found if not why.startswith(_CONSEQUENCE)] or found


def _wait(work: Work) -> None:
    """Waits for it where Ctrl-C is heard, which it is not within torch."""
    pause, longest = _PAUSES
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, longest)
    work.wait()
