"""A group whose ranks are counted in another order than its library counts them.

Shards are numbered by place and host, torch's groups by the job's ranks. Where hosts are several
this is what `shard` is. What it guarantees: buffers and facts are in the order of this numbering,
as with any other `Comm`. What it does not do: it is not for every step. A bucket's hops go over
`inner` and `outer`, and whatever goes over this one is copied once on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from zerort.errors import CommError
from zerort.mesh.comm import Comm, Control, GatherMemory, Piece, ScatterMemory, Work
from zerort.mesh.scatters import GatherInPlace, OwnMemory

__all__ = ["OrderedComm", "OrderedControl"]


class OrderedControl:
    """Small facts in that order."""

    def __init__(self, control: Control, order: Sequence[int]) -> None:
        self.control = control
        self._order = order
        self.rank, self.world = order.index(control.rank), control.world

    def over(self, control: Control) -> OrderedControl:
        """Another group of the same ranks, in the same order."""
        return OrderedControl(control, self._order)

    @property
    def name(self) -> str:
        """The group's."""
        return self.control.name

    @property
    def idle(self) -> Callable[[], None] | None:
        """The group's."""
        return self.control.idle

    @idle.setter
    def idle(self, call: Callable[[], None] | None) -> None:
        self.control.idle = call

    def all_reduce(self, values: Tensor) -> None:
        """The same in any order."""
        self.control.all_reduce(values)

    def broadcast(self, values: Tensor, source: int = 0) -> None:
        """From rank `source` of this order."""
        self.control.broadcast(values, self._order[source])

    def gather_objects(self, value: Any) -> list[Any]:
        """In this order."""
        values = self.control.gather_objects(value)
        return [values[place] for place in self._order]

    def failure(self, what: str, error: Exception) -> CommError:
        """As the group words it."""
        return self.control.failure(what, error)

    def set_timeout(self, timeout: timedelta) -> None:
        """Of the group."""
        self.control.set_timeout(timeout)

    def close(self, *, waits: bool = True) -> None:
        """Gives the group back."""
        self.control.close(waits=waits)


class OrderedComm:
    """`ranks` are the job's, all of `comm`'s, in the order in which they are to be counted."""

    def __init__(self, comm: Comm, ranks: Sequence[int]) -> None:
        self._comm = comm
        self._order = [comm.ranks.index(rank) for rank in ranks]
        self.ranks = tuple(ranks)
        self.rank, self.world = self._order.index(comm.rank), comm.world
        self.device: torch.device = comm.device
        self.window: int | None = comm.window
        self.control: Control = OrderedControl(comm.control, self._order)

    @property
    def failed(self) -> bool:
        """The group's."""
        return self._comm.failed

    def pieces(self, *, adds: bool) -> int:
        """As the library has it."""
        return self._comm.pieces(adds=adds)

    def scatter_memory(self, pieces: Sequence[Piece]) -> ScatterMemory:
        """This rank's own."""
        return OwnMemory(self, pieces)

    def gather_memory(self, nbytes: int) -> GatherMemory:
        """None."""
        return GatherInPlace(self)

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Through copies; `recv` too where a piece comes from each rank."""
        each = send.numel() // self.world
        every = recv.numel() == send.numel()
        leaving = _Copy(send, [each] * self.world, self._order)
        arriving = _Copy(
            recv, [each] * self.world if every else [each], self._order if every else [0]
        )
        return _Copied(
            self._comm.reduce_scatter(arriving.there, leaving.there), [leaving], [arriving]
        )

    def all_gather(self, buffer: Tensor) -> Work:
        """Through a copy."""
        copy = _Copy(buffer, [buffer.numel() // self.world] * self.world, self._order)
        return _Copied(self._comm.all_gather(copy.there), [copy], [copy])

    def all_to_all(
        self, recv: Tensor, send: Tensor, arriving: Sequence[int], leaving: Sequence[int]
    ) -> Work:
        """Through copies."""
        to, of = _Copy(send, leaving, self._order), _Copy(recv, arriving, self._order)
        work = self._comm.all_to_all(of.there, to.there, of.lengths, to.lengths)
        return _Copied(work, [to], [of])

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """From rank `source` of this order."""
        self._comm.broadcast(buffer, self._order[source])

    def failure(self, what: str, error: Exception) -> CommError:
        """As the group words it."""
        return self._comm.failure(what, error)

    def close(self, *, waits: bool = True) -> None:
        """Gives the groups back."""
        self._comm.close(waits=waits)


class _Copy:
    """A buffer of runs, one for each rank, and a copy with the runs in the library's order."""

    def __init__(self, here: Tensor, lengths: Sequence[int], order: Sequence[int]) -> None:
        self.there = torch.empty_like(here)
        by_place = sorted(range(len(order)), key=lambda number: order[number])
        self.lengths = [lengths[number] for number in by_place]
        runs, copies = torch.split(here, list(lengths)), torch.split(self.there, self.lengths)
        self._pairs = [(runs[number], copies[order[number]]) for number in by_place]

    def away(self) -> None:
        for here, there in self._pairs:
            there.copy_(here)

    def back(self) -> None:
        for here, there in self._pairs:
            here.copy_(there)


class _Copied(Work):
    """A collective over copies: `before` are made when it starts, `behind` brought back once it has
    been waited for.
    """

    def __init__(self, work: Work, before: Sequence[_Copy], behind: Sequence[_Copy]) -> None:
        super().__init__()
        self._work, self._before, self._behind = work, before, behind
        self._copied = False

    def start(self) -> Work:
        if not self._copied:
            for copy in self._before:
                copy.away()
            self._copied = True
        self._work.start()
        return self

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> None:
        self._work.wait()
        for copy in self._behind:
            copy.back()

    def when_complete(self, call: Callable[[], None]) -> None:
        self._work.when_complete(call)
