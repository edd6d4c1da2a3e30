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
or have none left, all of them go on over gloo, and one line in the log says why.

What it does not do: small facts, broadcasts at the start and exchanges of parameters are gloo's.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.errors import CommError
from zerort.mesh.comm import GatherMemory, Piece, Scatter, ScatterMemory, Work
from zerort.mesh.control import GlooControl
from zerort.mesh.gloo import GlooComm
from zerort.mesh.scatters import GatherInPlace
from zerort.mesh.segments import PAGE, Unshared, share

__all__ = ["SharedComm"]

_TURNS = 2
_LINE = 64
"""Bytes on which a turn begins."""
_SLICE = 0.05
"""Seconds between two looks at a peer that is waited for."""

_log = logging.getLogger("zerort")


class SharedComm:
    """The ranks of `gloo`. Where `required`, ranks that cannot share memory raise `CommError`."""

    window: int | None = None

    def __init__(self, gloo: GlooComm, timeout: timedelta, *, required: bool) -> None:
        self._gloo = gloo
        self._required = required
        self._timeout = timeout.total_seconds()
        self._why_not: str | None = None
        self._memories: weakref.WeakSet[_Memory] = weakref.WeakSet()
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
        """Shared, or this rank's own where it cannot be."""
        memory = self._memory(self.world * max(piece.nbytes for piece in pieces))
        return self._gloo.scatter_memory(pieces) if memory is None else _Scatters(memory)

    def gather_memory(self, nbytes: int) -> GatherMemory:
        """Shared, or none where it cannot be: gloo gathers in place."""
        memory = self._memory(nbytes)
        return GatherInPlace(self._gloo) if memory is None else _Gathers(memory)

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
        for memory in list(self._memories):
            memory.leave()
        self._gloo.close(waits=waits)

    def _memory(self, turn: int) -> _Memory | None:
        """Of `turn` bytes a turn; None where ranks do not share any. All ranks alike."""
        if self._why_not is not None:
            return None
        step = -(-turn // _LINE) * _LINE
        try:
            segment = share(self.control, -(-_TURNS * step // PAGE) * PAGE)
        except Unshared as error:
            self._refuse(str(error))
            return None
        memory = _Memory(self, segment, step)
        self._memories.add(memory)
        return memory

    def _refuse(self, why: str) -> None:
        if self._required:
            raise CommError(
                f"rank {self.control.groups.members.job_rank}: ranks cannot share memory, which "
                f'zerort.transport "shared" asks for: {why}. "auto" goes over gloo then'
            )
        self._why_not = why
        if self.rank == 0:
            _log.info("gradients and parameters go over gloo, not through shared memory: %s", why)

    @property
    def nbytes(self) -> int:
        """Of this rank's in memory that ranks share."""
        return sum(_TURNS * memory.step for memory in self._memories)

    # What a wait asks.

    def patience(self) -> float:
        """Seconds that a rank waits for its peers."""
        return self._timeout

    def gone(self, rank: int) -> str | None:
        """What has become of a rank's process, if it has ended."""
        peers, ranks = self.control.groups.peers, self.ranks
        fate = peers.everyone[ranks[rank]].process.fate()
        return None if fate is None or fate == "is stopped" else fate


class _Memory:
    """A segment, two turns of `step` bytes for each rank."""

    def __init__(self, comm: SharedComm, segment: _core.Segment, step: int) -> None:
        self.comm, self.segment, self.step = comm, segment, step
        self.channel = segment.channel(0)
        self.stride = segment.start(1) - segment.start(0)
        """Bytes from one rank's memory to the next one's."""
        ranks = range(comm.world)
        self._pieces = [
            [from_dlpack(segment.buffer(rank, turn * step, step)) for rank in ranks]
            for turn in range(_TURNS)
        ]
        # A fork is another process, which has left nothing.
        self.leave = weakref.finalize(self, _leave, segment, os.getpid())

    def of(self, rank: int, turn: int, nbytes: int) -> Tensor:
        """A rank's, as bytes."""
        return self._pieces[turn][rank].narrow(0, 0, nbytes)

    def across(self, start: int, length: int) -> Tensor:
        """From where `length` bytes from `start` on begin in the first rank's memory to where they
        end in the last one's, as bytes.
        """
        return from_dlpack(self.segment.across(start, length))


def _leave(segment: _core.Segment, process: int) -> None:
    if os.getpid() == process:
        segment.leave()


class _Scatters:
    """Of one lane: packed in shared memory, and summed out of it."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory

    def scatters(self, piece: Piece) -> Sequence[Scatter]:
        """One for each turn."""
        return [_Scatter(self._memory, piece, turn) for turn in range(_TURNS)]

    def turn(self) -> int:
        """By the number of the next use."""
        return self._memory.channel.next % _TURNS


class _Scatter:
    """In one turn."""

    def __init__(self, memory: _Memory, piece: Piece, turn: int) -> None:
        comm = memory.comm
        self._memory = memory
        self.send = memory.of(comm.rank, turn, comm.world * piece.nbytes).view(piece.dtype)
        mine = turn * memory.step + comm.rank * piece.nbytes
        self.recv = memory.across(mine, piece.nbytes).view(piece.dtype)
        self.pieces = comm.world
        self.stride = memory.stride // piece.dtype.itemsize

    def make(self, *, lost: bool) -> Work:
        """What has been packed is there when it is started."""
        return _Use(self._memory, lost=lost)


class _Gathers:
    """Of one bucket: each rank's shard is copied into shared memory, and out of it by the peers."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory

    def make(self, buffer: Tensor, *, lost: bool) -> Work:
        """Copies at the start, and at the end of the wait."""
        return _Gather(self._memory, buffer, lost=lost)


class _Use(Work):
    """One use of a memory. It is complete when all ranks have posted it."""

    def __init__(self, memory: _Memory, *, lost: bool) -> None:
        super().__init__()
        self._memory = memory
        self._channel = memory.channel
        self._number = memory.channel.next
        self._lost = lost
        self._looked = time.monotonic()
        self._calls_then: list[Callable[[], None]] = []

    def start(self) -> Work:
        """Posts what has been written, once."""
        if self._channel.next == self._number:
            if not self._lost:
                self.write()
            self._channel.post(self._number, lost=self._lost)
        return self

    def write(self) -> None:
        """What is not there yet; may be broken off and called again."""

    def read(self) -> None:
        """Takes what has come, once."""

    def is_completed(self) -> bool:
        """Whether `wait`, after `start`, would return, or raise, at once."""
        peer = self._channel.missing(self._number)
        if peer is None:
            self._tell()
            return True
        now = time.monotonic()
        if now - self._looked < _SLICE:
            return False
        self._looked = now
        return self._gone(peer) is not None

    def wait(self) -> None:
        """Blocks the host, without the interpreter's lock, and hears Ctrl-C."""
        end = time.monotonic() + self._memory.comm.patience()
        while (peer := self._channel.wait(self._number, _SLICE)) is not None:
            gone = self._gone(peer)
            if self._channel.missing(self._number) is None:
                break  # it had posted this before it went
            if gone is not None:
                raise RuntimeError(f"the process of rank {self._job_rank(peer)} {gone}")
            if time.monotonic() > end:
                raise RuntimeError(
                    f"rank {self._job_rank(peer)} has not come within "
                    f"{self._memory.comm.patience():g} s"
                )
        self._tell()
        if not self._lost:
            self.read()

    def taken(self) -> None:
        """Peers may write where this rank has read."""
        self._channel.finish(self._number)

    def when_complete(self, call: Callable[[], None]) -> None:
        """Calls `call` when this rank first sees it complete."""
        self._calls_then.append(call)
        self.is_completed()

    def _tell(self) -> None:
        while self._calls_then:
            self._calls_then.pop()()

    def _gone(self, peer: int) -> str | None:
        memory = self._memory
        left = "has given its engine back" if memory.segment.left(peer) else None
        return memory.comm.gone(peer) or left

    def _job_rank(self, peer: int) -> int:
        return self._memory.comm.ranks[peer]


class _Gather(_Use):
    """Each rank's shard of `buffer`, in place."""

    def __init__(self, memory: _Memory, buffer: Tensor, *, lost: bool) -> None:
        super().__init__(memory, lost=lost)
        self._shards = buffer.detach().view(torch.uint8).chunk(memory.comm.world)
        self._turn = self._number % _TURNS
        self._read = False

    def write(self) -> None:
        """This rank's shard."""
        rank = self._memory.comm.rank
        shard = self._shards[rank]
        self._memory.of(rank, self._turn, shard.numel()).copy_(shard)

    def read(self) -> None:
        """The peers'."""
        if self._read:
            return
        for rank, shard in enumerate(self._shards):
            if rank != self._memory.comm.rank:
                shard.copy_(self._memory.of(rank, self._turn, shard.numel()))
        self._read = True
