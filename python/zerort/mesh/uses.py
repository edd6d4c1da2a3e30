"""Collectives over memory that ranks share: what is written, posted, waited for and read.

What it guarantees: a use is posted once and read once, whatever raises between two lines; a wait
ends with the peer that has gone, or with the time-out. What it does not do: it maps no memory.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.errors import CommError
from zerort.mesh.comm import GatherMemory, Piece, Scatter, Work

__all__ = ["TURNS", "Mapped", "Memory", "Pool", "Scatters"]

TURNS = 2
_SLICE = 0.05
"""Seconds between two looks at a peer that is waited for."""


class Group(Protocol):
    """Who shares, and what a wait asks."""

    ranks: tuple[int, ...]
    rank: int
    world: int

    def patience(self) -> float:
        """Seconds that a rank waits for its peers."""

    def gone(self, rank: int) -> str | None:
        """What has become of a rank's process, if it has ended."""

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""


class Mapped:
    """A segment as this rank uses it, until nothing of it is used any more."""

    def __init__(self, group: Group, segment: _core.Segment) -> None:
        self.group, self.segment = group, segment
        self.stride = segment.start(1) - segment.start(0)
        """Bytes from one rank's memory to the next one's."""
        # A fork is another process, which has left nothing.
        self.leave = weakref.finalize(self, _leave, segment, os.getpid())


def _leave(segment: _core.Segment, process: int) -> None:
    if os.getpid() == process:
        segment.leave()


class Memory:
    """Two turns of `step` bytes of each rank, from `start` on in its memory of a segment, that are
    used under the channel `number`.
    """

    def __init__(self, mapped: Mapped, number: int, start: int, step: int) -> None:
        self.group, self.segment, self.stride = mapped.group, mapped.segment, mapped.stride
        self.step = step
        self.channel = self.segment.channel(number)
        self._mapped, self._start = mapped, start
        ranks = range(self.group.world)
        self._pieces = [
            [from_dlpack(self.segment.buffer(rank, start + turn * step, step)) for rank in ranks]
            for turn in range(TURNS)
        ]

    def of(self, rank: int, turn: int, nbytes: int) -> Tensor:
        """A rank's, as bytes."""
        return self._pieces[turn][rank].narrow(0, 0, nbytes)

    def across(self, turn: int, start: int, length: int) -> Tensor:
        """From where `length` bytes from `start` on begin in the first rank's turn to where they
        end in the last one's, as bytes.
        """
        start += self._start + turn * self.step
        return from_dlpack(self.segment.across(start, length))


class Scatters:
    """Of one lane: packed in shared memory, and summed out of it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def scatters(self, piece: Piece) -> Sequence[Scatter]:
        """One for each turn."""
        return [_Scatter(self._memory, piece, turn) for turn in range(TURNS)]

    def turn(self) -> int:
        """By the number of the next use."""
        return self._memory.channel.next % TURNS

    def gathers(self, nbytes: int) -> GatherMemory:
        """In the other turn: when a reduce-scatter was read, all ranks have read what lay there."""
        return _InLane(self._memory)


class _Scatter:
    """In one turn."""

    def __init__(self, memory: Memory, piece: Piece, turn: int) -> None:
        group = memory.group
        self._memory = memory
        self.send = memory.of(group.rank, turn, group.world * piece.nbytes).view(piece.dtype)
        mine = memory.across(turn, group.rank * piece.nbytes, piece.nbytes)
        self.recv = mine.view(piece.dtype)
        self.pieces = group.world
        self.stride = memory.stride // piece.dtype.itemsize

    def make(self, *, lost: bool) -> Work:
        """What has been packed is there when it is started."""
        return Use(self._memory, lost=lost)


class _InLane:
    """Each rank's shard is copied into a lane, and out of it by the peers."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def make(self, buffer: Tensor, *, lost: bool) -> Work:
        """Copies at the start, and at the end of the wait."""
        return Gather(self._memory, buffer, lost=lost)


class Use(Work):
    """One use of a memory. It is complete when all ranks have posted it."""

    def __init__(self, memory: Memory, *, lost: bool) -> None:
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
        patience = self._memory.group.patience()
        end = time.monotonic() + patience
        while (peer := self._channel.wait(self._number, _SLICE)) is not None:
            gone = self._gone(peer)
            if self._channel.missing(self._number) is None:
                break  # it had posted this before it went
            if gone is not None:
                raise RuntimeError(f"the process of rank {self._job_rank(peer)} {gone}")
            if time.monotonic() > end:
                raise RuntimeError(
                    f"rank {self._job_rank(peer)} has not come within {patience:g} s"
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
        return memory.group.gone(peer) or left

    def _job_rank(self, peer: int) -> int:
        return self._memory.group.ranks[peer]


class Gather(Use):
    """Each rank's shard of `buffer`, in place."""

    def __init__(self, memory: Memory, buffer: Tensor, *, lost: bool) -> None:
        super().__init__(memory, lost=lost)
        self._shards = buffer.detach().view(torch.uint8).chunk(memory.group.world)
        self._turn = self._number % TURNS
        self._read = False

    def write(self) -> None:
        """This rank's shard."""
        rank = self._memory.group.rank
        shard = self._shards[rank]
        self._memory.of(rank, self._turn, shard.numel()).copy_(shard)

    def read(self) -> None:
        """The peers'."""
        if self._read:
            return
        for rank, shard in enumerate(self._shards):
            if rank != self._memory.group.rank:
                shard.copy_(self._memory.of(rank, self._turn, shard.numel()))
        self._read = True


class Pool:
    """Memories that all-gathers use in rotation, whatever they gather; they start in one order on
    all ranks.

    Who finds the next memory's last gather not read on this rank reads that first, and may have to
    wait for its peers: what is started so far ahead is not needed soon.
    """

    def __init__(self, memories: Sequence[Memory]) -> None:
        self.memories = memories
        self.started = 0
        self.unread: list[Use | None] = [None] * len(memories)

    def make(self, buffer: Tensor, *, lost: bool) -> Work:
        """Copies at the start, and at the end of the wait."""
        return _Pooled(self, buffer, lost=lost)


class _Pooled(Work):
    """A gather, in the memory whose turn it is when it starts."""

    def __init__(self, pool: Pool, buffer: Tensor, *, lost: bool) -> None:
        super().__init__()
        self._pool, self._buffer, self._lost = pool, buffer, lost
        self._number = -1
        self._use: Use | None = None

    def start(self) -> Work:
        """Posts this rank's shard, once."""
        pool = self._pool
        if self._use is None:
            self._number = pool.started
            memory, before = pool.memories[self._place], pool.unread[self._place]
            if before is not None:
                self._end(before, memory.group)
            self._use = Gather(memory, self._buffer, lost=self._lost)
        if pool.started == self._number:
            pool.unread[self._place] = self._use
            self._use.start()
            pool.started = self._number + 1
        return self

    @property
    def _place(self) -> int:
        return self._number % len(self._pool.memories)

    def _end(self, before: Use, group: Group) -> None:
        try:
            before.wait()
        except RuntimeError as error:
            raise group.failure("all_gather", error) from error
        before.taken()

    def is_completed(self) -> bool:
        """Whether `wait`, after `start`, would return, or raise, at once."""
        return self._use is not None and self._use.is_completed()

    def wait(self) -> None:
        """Blocks the host, without the interpreter's lock, and hears Ctrl-C."""
        if self._use is not None:
            self._use.wait()

    def taken(self) -> None:
        """Peers may write where this rank has read."""
        if self._use is not None:
            self._use.taken()
            if self._pool.unread[self._place] is self._use:
                self._pool.unread[self._place] = None

    def when_complete(self, call: Callable[[], None]) -> None:
        """Calls `call` when this rank first sees it complete. It has started."""
        assert self._use is not None, "nothing has started"
        self._use.when_complete(call)
