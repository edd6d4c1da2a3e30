"""Measures the wire: what the collectives of a step cost on the engine's own groups.

Each kind is timed as a step uses it: buckets' reduce-scatters (on gloo all-to-alls), as many as the
library has under way at once, the gather that publishes buckets, several at once, and the vote's
small all-reduce. Sizes grow until one takes long enough to tell the rate, so that a slow wire is
not asked for more than it can carry in a second or two. What a link lets through for nothing after
a pause (a token bucket's burst) is in every sample alike, and so not in the rate.

What it guarantees: all ranks measure the same sizes and have the same figures, because the slowest
rank's times are everybody's. What it does not do: nothing else may be under way on these groups,
and it knows no plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from zerort.device import device_for
from zerort.mesh import Comm, Control, Mesh, Piece, Work
from zerort.tune.fit import Line, Sample, fit, middle

__all__ = ["Wire", "measure_wire"]

_SMALLEST, _LARGEST, _GROWTH = 16 << 10, 64 << 20, 4
"""Bytes of a collective."""
_LONG = 0.05
"""Seconds. One that takes as long tells the rate, and none is larger; but of three sizes at least,
for where the first takes long there may be little behind alpha.
"""
_MESSAGE, _DEAR = 256 << 10, 0.25
"""Bytes to each rank from which on messages go as those of large buckets do, over gloo both ways at
once; sizes grow until they are so long, unless one takes so many seconds before.
"""
_TELLING = 1 << 20
"""From here on a size takes longer than the smallest one, unless it is only announced, as gradients
are in memory that ranks share: who sums reads it, and that is timed with the work of a rank.
"""
_ROUNDS, _LEAST, _PATIENCE = 12, 5, 0.3
"""How often each size is timed at most and at least, and seconds that it may take between the two.
One more comes before, whose time does not count: it meets cold memory and ranks that are not in
step.
"""
_TOGETHER = 4
"""Gathers that are under way at once, as where buckets are published."""

_LANES = 2
"""Of gloo: its threads for a group."""

Start = Callable[[int], Callable[[], list[Work]]]
"""Takes a number of bytes; what it returns starts collectives over them in all."""


@dataclass(frozen=True)
class Wire:
    """What collectives cost between `ranks` ranks; bytes are those of a whole bucket as it is
    sent.
    """

    ranks: int
    reduce: Line
    """From a bucket to this rank's shard of the sum, without adding it up."""
    gather: Line
    """From shards to the whole, of one of several that are under way."""
    vote: float
    """Seconds of the all-reduce of a step's vote."""
    lanes: int = 1
    """Collectives that the library has under way at once."""
    start_reduce: float = 0.0
    """Seconds that the host takes to start one from a bucket to its sum, of whatever length."""
    start_gather: float = 0.0
    """And one from shards to the whole."""


def measure_wire(mesh: Mesh) -> Wire:
    """All ranks call it, between steps. A single rank has no wire: all is 0. Raises `CommError`."""
    comm = mesh.shard
    if comm.world == 1:
        return Wire(1, Line(0.0, 0.0), Line(0.0, 0.0), 0.0)
    meter = Meter(comm.control, comm)
    lanes = _LANES if mesh.device.type == "cpu" else 1
    large = comm.world * _MESSAGE
    return Wire(
        comm.world,
        fit(meter.samples(lambda nbytes: _reduces(comm, nbytes, lanes), lanes * large)),
        _each(fit(meter.samples(lambda nbytes: _gathers(comm, nbytes), _TOGETHER * large)), lanes),
        meter.vote(),
        lanes,
        meter.starting(_reduces(comm, _SMALLEST, lanes)),
        meter.starting(_gathers(comm, _SMALLEST)),
    )


class Meter:
    """Times collectives on one group."""

    def __init__(self, control: Control, comm: Comm) -> None:
        self._control = control
        self._device = device_for(comm.device)

    def samples(self, start: Start, large: int = 0) -> list[Sample]:
        """Of growing sizes, one of which at least is of `large` bytes."""
        found: list[Sample] = []
        nbytes, took, first = _SMALLEST, 0.0, 0.0
        while nbytes <= _LARGEST and (
            took < _LONG
            or nbytes <= _SMALLEST * _GROWTH
            or (nbytes < large * _GROWTH and took < _DEAR)
        ):
            run = start(nbytes)
            rounds = min(_ROUNDS, max(_LEAST, int(_PATIENCE / (_GROWTH * took + 1e-9))))
            times = self._slowest([self._timed(run) for _ in range(1 + rounds)])[1:]
            found += [Sample(nbytes, seconds) for seconds in times]
            took = middle(times)
            first = first or took
            if nbytes >= max(large, _TELLING) and took < 2 * first:
                break  # nothing is moved
            nbytes *= _GROWTH
        return found

    def starting(self, run: Callable[[], list[Work]]) -> float:
        """Seconds of the host until one is on its way; `run` starts several."""
        times = []
        for _ in range(1 + _ROUNDS):
            begun = time.perf_counter()
            works = run()
            times.append((time.perf_counter() - begun) / len(works))
            _finish(works)
        return middle(self._slowest(times)[1:])

    def vote(self) -> float:
        """The typical one of a few."""
        row = torch.zeros(self._control.world, 6, dtype=torch.float64)
        times = []
        for _ in range(2 * _ROUNDS):
            begun = time.perf_counter()
            self._control.all_reduce(row)
            times.append(time.perf_counter() - begun)
        return middle(self._slowest(times[1:]))

    def _timed(self, run: Callable[[], list[Work]]) -> float:
        self._settle()
        begun = time.perf_counter()
        _finish(run())
        self._settle()
        return time.perf_counter() - begun

    def _settle(self) -> None:
        """The device is done, where it is not the host."""
        event = self._device.moment()
        if event is not None:
            event.synchronize()

    def _slowest(self, times: list[float]) -> list[float]:
        """Of all ranks', time by time."""
        rows = torch.zeros(self._control.world, len(times), dtype=torch.float64)
        rows[self._control.rank] = torch.tensor(times, dtype=torch.float64)
        self._control.all_reduce(rows)
        slowest: list[float] = rows.amax(0).tolist()
        return slowest


def _finish(works: list[Work]) -> None:
    for work in works:
        work.wait()
        work.taken()


def _each(together: Line, lanes: int) -> Line:
    """Of one, where so many went together, `lanes` at a time."""
    return Line(together.alpha * lanes / _TOGETHER, together.beta)


def _reduces(comm: Comm, nbytes: int, lanes: int) -> Callable[[], list[Work]]:
    """As many as go at once, all together of `nbytes`, in memory such as a bucket's."""
    piece = Piece(_elements(comm, nbytes // lanes), torch.float32, adds=True)
    memories = [comm.scatter_memory([piece]) for _ in range(lanes)]
    turns = [(memory, memory.scatters(piece)) for memory in memories]
    return lambda: [scatters[memory.turn()].make(lost=False).start() for memory, scatters in turns]


def _gathers(comm: Comm, nbytes: int) -> Callable[[], list[Work]]:
    """All together they are of `nbytes`."""
    shard = _elements(comm, nbytes // _TOGETHER)
    gathers = [
        (comm.gather_memory(4 * shard), torch.zeros(comm.world * shard, device=comm.device))
        for _ in range(_TOGETHER)
    ]
    return lambda: [memory.make(buffer, lost=False).start() for memory, buffer in gathers]


def _elements(comm: Comm, nbytes: int) -> int:
    """Of a shard, in fp32."""
    return max(1, nbytes // (4 * comm.world))
