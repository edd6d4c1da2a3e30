"""The contract of a communicator: flat buffers and small facts between ranks.

What it guarantees: every call is made on groups of the engine's own, so a collective of the user's
can never pair with one of ours, and every group has the configured time-out, so no rank waits for a
peer for ever. What it deliberately does not do: it knows no buckets, dtypes or steps, and it
decides no order.

Reduction is split at the wire: a `Comm` delivers equal `pieces` of this rank's shard, and the wire
format adds them up. gloo delivers one piece from each rank (an all-to-all moves (N-1)/N of the
bytes, half of what gloo's own reduce-scatter does, and lets us add in rank order); NCCL adds on the
way and delivers one, unless what is sent is encoded so that it must not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.errors import CommError

__all__ = [
    "Comm",
    "Control",
    "GatherMemory",
    "Handles",
    "Piece",
    "Scatter",
    "ScatterMemory",
    "Work",
]


Handles = dict[int, "dist.Work | None"]
"""What torch's library gave for each of a collective's calls so far."""


class Work:
    """A collective: made first, then started, then waited for.

    It consists of one or several of torch's works, none where nothing moves; each of `calls` hands
    one of them to the library. `count` is the library's own count of what it has been given, so
    that a `start` which an exception has cut off, Ctrl-C between two instructions included, can be
    called again: nothing is given twice and nothing is left out. A handle that was lost that way is
    not waited for; by then the rank has failed, and the result is not read. `waited` is called
    when all have been waited for.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], dist.Work | None]] = (),
        count: Callable[[], int] = lambda: 0,
        waited: Callable[[], object] = lambda: None,
    ) -> None:
        self._calls = calls
        self._count = count
        self._waited = waited
        self._first: int | None = None
        self.handles: Handles = {}

    def start(self) -> Work:
        """Hands the collective to the library, once. Raises `CommError`."""
        if self._first is None:
            self._first = self._count()
        while (given := self._given(self._first)) < len(self._calls):
            self.handles[given] = self._calls[given]()
        return self

    def _given(self, first: int) -> int:
        return max(self._count() - first, max(self.handles, default=-1) + 1)

    def is_completed(self) -> bool:
        """Whether `wait`, after `start`, would return at once."""
        return all(work.is_completed() for work in self._works())

    def wait(self) -> None:
        """Blocks the host where the device does, elsewhere makes the current stream wait. Raises
        `RuntimeError` when the collective failed.
        """
        for work in self._works():
            work.wait()
        self._waited()

    def taken(self) -> None:
        """What has arrived was read, or will not be."""

    def when_complete(self, call: Callable[[], None]) -> None:
        """Calls `call` on the worker that completes the last of them; at once where there is
        nothing to move.
        """
        works = self._works()
        if not works:
            call()
            return
        works[-1].get_future().add_done_callback(lambda _: call())

    def _works(self) -> list[dist.Work]:
        return [work for work in self.handles.values() if work is not None]


@dataclass(frozen=True)
class Piece:
    """What one rank gets of another in a reduce-scatter: `length` elements of `dtype`, which a
    network may add up if `adds`.
    """

    length: int
    dtype: torch.dtype
    adds: bool

    @property
    def nbytes(self) -> int:
        """Of one."""
        return self.length * self.dtype.itemsize


class Scatter(Protocol):
    """One reduce-scatter and its memory."""

    @property
    def send(self) -> Tensor:
        """A piece for each rank, in rank order (world x length,). Written before `make`."""

    @property
    def recv(self) -> Tensor:
        """What arrives, complete when the work is: `pieces` of them, in rank order, each `stride`
        elements behind the one before; what lies between them is not read.
        """

    @property
    def pieces(self) -> int:
        """How many arrive: those that `Comm.pieces` says."""

    @property
    def stride(self) -> int:
        """From one piece's first element to the next one's; at least a piece's length."""

    def make(self, *, lost: bool) -> Work:
        """The collective, not started. Where it is `lost`, peers have to find a partner, and
        what is sent and what arrives is not used.
        """


class ScatterMemory(Protocol):
    """What reduce-scatters that follow one another use, of one group. One is in it at a time: the
    next is written when what has arrived for the last was read on this rank.
    """

    def scatters(self, piece: Piece) -> Sequence[Scatter]:
        """For pieces of this kind, which the memory was made for: as many as are used in turn."""

    def turn(self) -> int:
        """Which of them is the next; the same on all ranks, whatever its piece. It goes on when a
        collective over the memory has been started, and not before.
        """

    def gathers(self, nbytes: int) -> GatherMemory:
        """For all-gathers of up to `nbytes` of each rank, not more than is scattered, each of which
        starts when what a reduce-scatter brought was read on this rank, and is read itself before
        the next of either. All ranks call it as they do `Comm.gather_memory`.
        """


class GatherMemory(Protocol):
    """What all-gathers that follow one another use, of one group, beside the buffers that they
    fill.
    """

    def make(self, buffer: Tensor, *, lost: bool) -> Work:
        """`Comm.all_gather` of a buffer that is no longer than this memory was made for; `lost` as
        for a `Scatter`.
        """


class Control(Protocol):
    """Small facts between ranks, exchanged on the host: votes, decisions, reasons.

    On every device these have a time-out that names a rank, and no stream ever waits for them.
    Tensors are CPU tensors.
    """

    @property
    def rank(self) -> int:
        """This rank's place in the group."""

    @property
    def world(self) -> int:
        """How many ranks the group has."""

    @property
    def name(self) -> str:
        """The same on all ranks, and no other group's; empty where there is one rank."""

    idle: Callable[[], None] | None
    """Called again and again while `all_reduce` waits for a peer, where there is one to call."""

    def all_reduce(self, values: Tensor) -> None:
        """Sums small `values` over the ranks, in place."""

    def broadcast(self, values: Tensor, source: int = 0) -> None:
        """Copies `values` from rank `source` to all, in place."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Slow: for set-up, saving and failures."""

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a rank waits for its peers from now on."""

    def close(self, *, waits: bool = True) -> None:
        """Gives the group back, and `waits` for what is under way on it, at most as long as for any
        peer. A second call does nothing.
        """


class Comm(Protocol):
    """A group of ranks, and what the engine needs of a communication library over it.

    `ranks` are its members as the job numbers them; `rank` is this one's place
    among them, `world` their number. Buffers are 1-D and contiguous; a bucket's buffer is `world`
    equal shards in the order of `ranks`.
    """

    ranks: tuple[int, ...]
    rank: int
    world: int
    device: torch.device
    window: int | None
    """Buckets in flight unless the configuration says otherwise; None means all."""

    @property
    def control(self) -> Control:
        """Small facts between the same ranks."""

    @property
    def failed(self) -> bool:
        """Whether a collective of these ranks has failed."""

    def pieces(self, *, adds: bool) -> int:
        """How many pieces of this rank's shard arrive: one where the library adds on the way, which
        it may only if `adds`; else one from each rank, in rank order.
        """

    def scatter_memory(self, pieces: Sequence[Piece]) -> ScatterMemory:
        """Memory for reduce-scatters of these pieces, one after the other. All ranks call it, in
        the same order, and nothing is under way.
        """

    def gather_memory(self, nbytes: int) -> GatherMemory:
        """Memory for all-gathers of up to `nbytes` of each rank, one after the other. All ranks
        call it as they do `scatter_memory`.
        """

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """What moves `send` (world x n,) so that `recv` (pieces x n,) sums up to this rank's shard;
        one piece may lie in this rank's slice of `send`. Asynchronous, once started.
        """

    def all_gather(self, buffer: Tensor) -> Work:
        """What fills `buffer` (world x n,) in place: each rank's own shard is already there when it
        is started. Asynchronous.
        """

    def all_to_all(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """What sends each rank its run of `send`, so many elements as `leaving` has for it, and
        fills `recv` with what each has for this one, of lengths `arriving`; both by rank. All ranks
        make it, also with nothing to send. Asynchronous.
        """

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Copies `buffer`, on `device`, from rank `source` to all, in place."""

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""

    def close(self, *, waits: bool = True) -> None:
        """Gives the groups back, as those of `control`; a second call does nothing."""
