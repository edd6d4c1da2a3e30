"""CPU tensors through memory that the ranks of one host share.

Each rank packs what it sends into a segment that its peers map, posts that it is there, and sums or
copies its own part straight out of theirs: no socket, no thread, and no copy but the packing.

    reduce_scatter   rank 0   pack b ─ post ┄┄┄┄┄ all have posted ─ sum piece 0 of every rank's b
                     rank 1        pack b ─ post ┄ all have posted ─ sum piece 1 of every rank's b
    all_gather       each rank copies its shard in, posts, and copies its peers' out

A start never blocks, and nothing happens beside the calls of this rank: whether a collective is
complete is read from counters. Memory is used in turn (`zerort_core::turns`), so that a start finds
what it writes read by all. Sums are those of gloo, to the bit.

What it guarantees: a peer that has ended, or has given its engine back, ends a wait for it within
tenths of a second, and one that does not come within the time-out. Where ranks cannot share memory,
or have none left, all of them go on over gloo, and one line in the log says why: those of the other
parts of the job too, for gloo's groups are made by all ranks.

Memory is asked for first, and made for all that has been asked for at once (`settle`): so many
rounds among the ranks, however many buckets there are. All-gathers of one such time have a few
memories in rotation where each of its own would be large (`Pool`).

What it does not do: small facts, broadcasts at the start and exchanges of parameters are gloo's.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate

from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.comm import GatherMemory, Piece, Scatter, ScatterMemory, Work
from zerort.mesh.control import GlooControl
from zerort.mesh.gloo import GlooComm
from zerort.mesh.rounds import come, first_reason
from zerort.mesh.segments import PAGE, Unshared, share
from zerort.mesh.uses import TURNS, Mapped, Memory, Pool, Scatters

__all__ = ["SharedComm", "gathers_bytes", "scatters_bytes"]

_LINE = 64
"""Bytes on which a turn begins."""
_ENOUGH = 16 << 20
"""Bytes of a rank's for gathers, unless `_LEAST` of them take more."""
_LEAST = 4
"""Gathers that are under way without one waiting for another."""

_log = logging.getLogger("zerort")


def scatters_bytes(nbytes: int) -> int:
    """What a rank has in shared memory for reduce-scatters of `nbytes` for all ranks together."""
    return TURNS * _step(nbytes)


def gathers_bytes(sizes: Sequence[int]) -> int:
    """And for all-gathers, of which each rank's part has these bytes."""
    return scatters_bytes(max(sizes, default=0)) * _depth(sizes)


def _depth(sizes: Sequence[int]) -> int:
    """How many are under way without one waiting for another."""
    each = scatters_bytes(max(sizes, default=0))
    return min(len(sizes), max(_LEAST, _ENOUGH // max(each, 1)))


def _step(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


class SharedComm:
    """The ranks of `gloo`, all of `job` or a part. Where `required`, ranks that cannot share memory
    raise `CommError`.
    """

    window: int | None = None

    def __init__(
        self, gloo: GlooComm, job: GlooControl, timeout: timedelta, *, required: bool
    ) -> None:
        self._gloo, self._job = gloo, job
        self._required = required
        self._timeout = timeout.total_seconds()
        self._why_not: str | None = None
        self._wanted: list[_Scatters | _Gathers] = []
        self._memories: weakref.WeakSet[Memory] = weakref.WeakSet()
        self._mapped: weakref.WeakSet[Mapped] = weakref.WeakSet()
        self.ranks, self.rank, self.world = gloo.ranks, gloo.rank, gloo.world
        self.device = gloo.device

    @property
    def control(self) -> GlooControl:
        """gloo's."""
        return self._gloo.control

    @property
    def failed(self) -> bool:
        """gloo's."""
        return self._gloo.failed

    def pieces(self, *, adds: bool) -> int:
        """One from each rank."""
        return self.world

    def scatter_memory(self, pieces: Sequence[Piece]) -> ScatterMemory:
        """Shared, or this rank's own where it cannot be; made by `settle`, or when it is used."""
        wanted = _Scatters(self, pieces)
        self._wanted.append(wanted)
        return wanted

    def gather_memory(self, nbytes: int) -> GatherMemory:
        """Shared, or none where it cannot be: gloo gathers in place; made as for scatters."""
        wanted = _Gathers(self, nbytes)
        self._wanted.append(wanted)
        return wanted

    def settle(self) -> None:
        """Makes the memory that has been asked for since the last time. All ranks of the job call
        it, with nothing under way. Raises `CommError`.
        """
        wanted, self._wanted = self._wanted, []
        if wanted and self._is_part and self._why_not is None:
            come(self._job)  # of a rank that has failed all hear, whatever they would wait in
        scatters = [one for one in wanted if isinstance(one, _Scatters)]
        gathers = [one for one in wanted if isinstance(one, _Gathers)]
        sizes = [one.nbytes for one in gathers]
        steps = [_step(one.nbytes) for one in scatters]
        steps += [_step(max(sizes, default=0))] * _depth(sizes)
        memories = self._share(steps) if any(steps) and self._why_not is None else None
        if memories is None:
            for one in scatters:
                one.found = self._gloo.scatter_memory(one.pieces)
            for each in gathers:
                each.found = self._gloo.gather_memory(each.nbytes)
            return
        for one, memory in zip(scatters, memories, strict=False):
            one.found = Scatters(memory)
        pool = Pool(memories[len(scatters) :])
        for each in gathers:
            each.found = pool

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """gloo's, in memory that ranks do not share."""
        return self._gloo.reduce_scatter(recv, send)

    def all_gather(self, buffer: Tensor) -> Work:
        """gloo's, in memory that ranks do not share."""
        return self._gloo.all_gather(buffer)

    def all_to_all(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """gloo's."""
        return self._gloo.all_to_all(recv, send, arriving, leaving)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """gloo's."""
        self._gloo.broadcast(buffer, source)

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""
        return self._gloo.failure(what, error)

    def close(self, *, waits: bool = True) -> None:
        """This rank has left; the memory goes with who uses it. A second call does nothing."""
        for mapped in list(self._mapped):
            mapped.leave()
        self._gloo.close(waits=waits)

    def _share(self, steps: Sequence[int]) -> list[Memory] | None:
        """Memories of so many bytes a turn, in one segment; None where ranks do not share any. All
        ranks alike.
        """
        total, why = TURNS * sum(steps), None
        try:
            segment = share(self.control, len(steps), -(-total // PAGE) * PAGE)
        except Unshared as error:
            why = str(error)
        if self._is_part:
            why = first_reason(self._job, why)
        if why is not None:
            self._refuse(why)
            return None
        mapped = Mapped(self, segment)
        ends = [*accumulate((TURNS * step for step in steps), initial=0)]
        memories = [Memory(mapped, number, ends[number], step) for number, step in enumerate(steps)]
        self._mapped.add(mapped)
        self._memories.update(memories)
        return memories

    @property
    def _is_part(self) -> bool:
        return self.world < self._job.world

    def _refuse(self, why: str) -> None:
        if self._required:
            raise CommError(
                f"rank {self._job.rank}: ranks cannot share memory, which "
                f'zerort.transport "shared" asks for: {why}. "auto" goes over gloo then'
            )
        self._why_not = why
        if self._job.rank == 0:
            what = "what else is sent goes" if self._memories else "gradients and parameters go"
            _log.info("%s over gloo, not through shared memory: %s", what, why)

    @property
    def nbytes(self) -> int:
        """Of this rank's in memory that ranks share."""
        return sum(TURNS * memory.step for memory in self._memories)

    # What a wait asks.

    def patience(self) -> float:
        """Seconds that a rank waits for its peers."""
        return self._timeout

    def gone(self, rank: int) -> str | None:
        """What has become of a rank's process, if it has ended."""
        peers, ranks = self.control.groups.peers, self.ranks
        fate = peers.everyone[ranks[rank]].process.fate()
        return None if fate is None or fate == "is stopped" else fate


class _Scatters:
    """Of one lane, once it is settled where."""

    def __init__(self, comm: SharedComm, pieces: Sequence[Piece]) -> None:
        self._comm, self.pieces = comm, pieces
        self.nbytes = comm.world * max(piece.nbytes for piece in pieces)
        self.found: ScatterMemory | None = None

    def _settled(self) -> ScatterMemory:
        if self.found is None:
            self._comm.settle()
        assert self.found is not None
        return self.found

    def scatters(self, piece: Piece) -> Sequence[Scatter]:
        """As shared memory has it, or gloo."""
        return self._settled().scatters(piece)

    def turn(self) -> int:
        """As shared memory has it, or gloo."""
        return self._settled().turn()

    def gathers(self, nbytes: int) -> GatherMemory:
        """As shared memory has it, or gloo."""
        return self._settled().gathers(nbytes)


class _Gathers:
    """Of one bucket, once it is settled where."""

    def __init__(self, comm: SharedComm, nbytes: int) -> None:
        self._comm, self.nbytes = comm, nbytes
        self.found: GatherMemory | None = None

    def make(self, buffer: Tensor, *, lost: bool) -> Work:
        """As shared memory has it, or gloo."""
        if self.found is None:
            self._comm.settle()
        assert self.found is not None
        return self.found.make(buffer, lost=lost)
