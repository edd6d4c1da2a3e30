"""The boundary: what all ranks decide together about a step, and the step.

The vote is one small all-reduce. Every rank fills its own row, so the sum is everybody's row, in
rank order on every rank: the norm is summed in one order everywhere, and a culprit has a number. It
carries the squared norm, what is left in `.grad`, a poison flag, whether exchanged parameters have
been written, whether a save beside training has failed, and a fingerprint; the host reads it before
the optimizer runs. No rank applies a step that any rank has reported as failed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zerort.memory import FlatModel
from zerort.mesh import Mesh

__all__ = ["Ballot", "Verdict", "clip_factor", "vote"]

_HALF = 1 << 32


@dataclass(frozen=True)
class Ballot:
    """What one rank brings to the vote."""

    unreduced: int
    """Parameters with a gradient that no pass has taken."""
    poisoned: bool
    """This rank could not complete its backward."""
    fingerprint: int
    """64 bits over the schedule and over which parameters are frozen."""
    written: bool = False
    """Something outside a step has written into exchanged parameters, whose masters are elsewhere.
    """
    unsaved: bool = False
    """A save beside training has failed on this rank, which concerns no step, and has not been
    raised yet.
    """


@dataclass(frozen=True)
class Verdict:
    """What all ranks know after the vote; equal on every rank."""

    norm: float
    """Of the summed gradient, still times the loss scale; not finite when any element anywhere is
    not.
    """
    unreduced: int
    poisoned: tuple[int, ...]
    """Ranks that failed."""
    mismatched: tuple[int, ...]
    """Ranks whose fingerprint is not rank 0's."""
    written: bool = False
    """Masters on some rank have to follow what was written on some rank."""
    unsaved: tuple[int, ...] = ()
    """Ranks on which a save beside training has failed."""

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.norm)


def vote(mesh: Mesh, flat: FlatModel, ballot: Ballot) -> Verdict:
    """Exchanges the ballots: one all-reduce of seven doubles a rank, on the host. Before it the
    squares are read from the device, which is the boundary's one synchronisation. Of the ranks that
    hold one shard the first brings them.
    """
    high, low = divmod(ballot.fingerprint, _HALF)
    row = [_total([bucket.squares for bucket in flat.trained]) if mesh.counts() else 0.0]
    row += [float(ballot.unreduced), float(ballot.poisoned), float(ballot.written)]
    row += [float(ballot.unsaved), float(high), float(low)]
    rows = torch.zeros(mesh.world, len(row), dtype=torch.float64)
    rows[mesh.rank] = torch.tensor(row, dtype=torch.float64)
    mesh.control.all_reduce(rows)
    return _count(rows.tolist())


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this norm are divided by, so that none is longer than `limit`; 0 turns
    clipping off.

    Mirrors DeepSpeed: max(1, (norm + 1e-6) / limit).
    """
    return max(1.0, (norm + 1e-6) / limit) if limit > 0 else 1.0


def _total(squares: Sequence[float | Tensor]) -> float:
    """Their sum, in order; what lies on a device is brought to the host in one copy."""
    there = [value for value in squares if isinstance(value, Tensor)]
    brought = iter(torch.stack(there).tolist() if there else ())
    return float(sum(next(brought) if isinstance(v, Tensor) else v for v in squares))


def _count(rows: list[list[float]]) -> Verdict:
    squares = 0.0
    for row in rows:
        squares += row[0]
    prints = [row[5:] for row in rows]
    # Rounded to fp32 once: the fp64 sum differs in its last bits with where buckets are cut, the
    # norm must not.
    norm = torch.tensor(squares, dtype=torch.float64).sqrt().float().item()
    return Verdict(
        norm=norm,
        unreduced=int(sum(row[1] for row in rows)),
        poisoned=tuple(rank for rank, row in enumerate(rows) if row[2]),
        mismatched=tuple(rank for rank, mark in enumerate(prints) if mark != prints[0]),
        written=any(row[3] for row in rows),
        unsaved=tuple(rank for rank, row in enumerate(rows) if row[4]),
    )
