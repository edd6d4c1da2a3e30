"""Runs the schedule: Launch starts a bucket's collective, Retire takes its result.

What it guarantees: commands run in the order of the list and never before the core has allowed
them; memory and collective of a bucket stay alive together until its result has been taken; no hook
ever blocks (RED-5): a command whose bucket or memory is still under way ends the run, and only
`drain` waits. What it does not do: it decides nothing about the order, and it does not know what a
step is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from zerort import _core
from zerort.device import streams_for
from zerort.errors import CommError
from zerort.memory import DTYPES, FlatBucket, FlatModel
from zerort.mesh import Comm, Work
from zerort.run import nonfinite
from zerort.run.flight import Inflight, Transport, lane_for
from zerort.trace.watch import Watch

__all__ = ["Executor", "Fold"]


@dataclass(frozen=True)
class Fold:
    """How a pass ends up in the accumulators: times `scale`, onto what is there if `add`."""

    scale: float
    add: bool


@dataclass(frozen=True)
class Program:
    """A plan's schedule with verbs and memory in place of kinds and numbers."""

    commands: Sequence[tuple[Callable[[Inflight], None], Inflight]] = ()
    launches_end: int = 0
    """One past the last Launch."""
    gathers_sums: bool = False
    """Each sum is brought to all ranks, because every rank has the whole optimizer."""


class Executor:
    """A second cursor into the schedule: what has run, behind what is allowed to."""

    def __init__(
        self, flat: FlatModel, comm: Comm, transports: Sequence[Transport], watch: Watch
    ) -> None:
        self.streams = streams_for(comm.device)
        self.absent: list[str] = []
        self.nonfinite: tuple[int, int] | None = None
        self.waited = 0.0
        self._flat = flat
        self._comm = comm
        self._transports = transports
        self.watch = watch
        self._lock = threading.Lock()
        self._program = Program()
        self._cursor = self._allowed = 0
        self._fold = Fold(1.0, add=False)
        self._gathering: list[Inflight] = []

    def load(self, plan: _core.Plan) -> None:
        """Takes the plan's schedule; memory for buckets in flight is allocated here and never in a
        step.
        """
        for _, flight in self._program.commands:
            flight.before = None  # a ring would keep its memory until the collector comes by
        self._program = Program()  # whose memory goes before the new is asked for
        verbs = {"launch": self._launch, "retire": self._retire}
        flights = self._flights(plan)
        self._program = Program(
            [(verbs[kind], flights[bucket]) for kind, bucket in plan.schedule],
            launches_end=1
            + max(i for i, (kind, _) in enumerate(plan.schedule) if kind == "launch"),
            gathers_sums=not plan.shards_optimizer and self._comm.world > 1,
        )
        self._cursor = self._allowed = 0

    def _flights(self, plan: _core.Plan) -> dict[int, Inflight]:
        """By bucket. The n-th launch uses lane n modulo the window."""
        order = [bucket for kind, bucket in plan.schedule if kind == "launch"]
        flights: dict[int, Inflight] = {}
        for position in range(plan.window):
            users = order[position :: plan.window]
            lane = lane_for(
                [self._flat.buckets[b] for b in users],
                [self._transports[b] for b in users],
                self._comm,
            )
            flights |= {
                b: Inflight(self._flat.buckets[b], self._transports[b], lane, self._comm)
                for b in users
            }
            for last, b in zip(users[-1:] + users, users, strict=False):
                flights[b].before = flights[last] if lane.shared else None
        return flights

    def begin(self, fold: Fold) -> None:
        """Starts at the head of the list."""
        self._fold = fold
        self._cursor = self._allowed = 0
        self.absent = []
        self.streams.begin()

    def run(self, hi: int) -> None:
        """Runs what is below `hi` as far as it goes without blocking. Called from hooks, on any
        thread.
        """
        with self._lock:
            self._allowed = max(self._allowed, hi)
            self._advance(self._allowed, wait=False)

    def launch_all(self) -> None:
        """Runs the list as far as its last Launch; waits only where the window has no room."""
        with self._lock:
            self._allowed = len(self._program.commands)
            self._advance(self._program.launches_end, wait=True)
            self._advance(self._allowed, wait=False)

    def drain(self) -> None:
        """Runs all that is allowed, waiting where it must; then the accumulators may be read."""
        with self._lock:
            self._advance(self._allowed, wait=True)
        self.streams.join()
        for flight in self._gathering:
            self._take_sums(flight)
        self._gathering.clear()

    def publish(self) -> None:
        """Brings every rank's updated shard to all ranks, and waits."""
        if not self._program.gathers_sums:
            works = [
                (bucket, self._gather(bucket, bucket.values.tensor))
                for bucket in self._flat.buckets
            ]
            for bucket, work in works:
                self._complete(work, f"all_gather of {_contents(bucket)}")
        self._flat.published()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within, the caller stands still for the collective `what`; `waited` adds up the host's
        seconds of it.

        A collective that fails or times out raises `CommError` naming it.
        """
        mark, start = self.watch.mark(), perf_counter()
        try:
            yield
        except CommError:
            raise  # it names its operation already
        except RuntimeError as error:
            raise self._comm.failure(what, error) from error
        finally:
            self.waited += perf_counter() - start
            self.watch.waited(mark, what)

    def _advance(self, end: int, *, wait: bool) -> None:
        while self._cursor < end:
            verb, flight = self._program.commands[self._cursor]
            if not wait and flight.must_wait:
                return
            verb(flight)
            self._cursor += 1

    def _launch(self, flight: Inflight) -> None:
        self.streams.before_pack(shared=flight.before is not None)
        if flight.before is not None:
            self._take_sums(flight.before)
        self.absent += flight.pack()
        self.streams.after_pack()
        flight.work = self._comm.reduce_scatter(flight.recv.tensor, flight.send)
        spec = flight.bucket.spec
        self.watch.launched(spec, flight.send.nbytes, DTYPES[flight.send.dtype])
        self.watch.started(f"reduce_scatter b{spec.id}", flight.send.nbytes, flight.work)

    def _retire(self, flight: Inflight) -> None:
        bucket = flight.bucket
        with self.streams.side():
            if flight.work is not None:
                self._complete(flight.work, f"reduce_scatter of {_contents(bucket)}")
            flight.work = None
            scale = self._fold.scale * flight.transport.predivide
            bucket.squares = flight.transport.wire.decode(
                flight.recv, bucket.reduced_shard, scale=scale, add=self._fold.add
            )
            if (
                isinstance(bucket.squares, float)
                and not math.isfinite(bucket.squares)
                and self.nonfinite is None
            ):
                self.nonfinite = nonfinite.in_arrival(bucket, flight.recv, self._comm.rank)
            if self._program.gathers_sums:
                self._gather_sums(flight)
        self.watch.retired(bucket.spec)

    def _gather_sums(self, flight: Inflight) -> None:
        if flight.narrows:
            # What every rank will step with is the rounded sum, so the norm is that one's.
            flight.bucket.squares = flight.transport.wire.round(
                flight.bucket.reduced_shard, flight.own
            )
        flight.work = self._gather(flight.bucket, flight.gathered)
        self._gathering.append(flight)

    def _take_sums(self, flight: Inflight) -> None:
        if flight.work is None:
            return
        self._complete(flight.work, f"all_gather of summed gradients, {_contents(flight.bucket)}")
        flight.work = None
        if flight.narrows:
            flight.bucket.accum.tensor.copy_(flight.gathered)

    def _complete(self, work: Work, what: str) -> None:
        with self.waiting(what):
            work.wait()

    def _gather(self, bucket: FlatBucket, buffer: Tensor) -> Work:
        work = self._comm.all_gather(buffer)
        self.watch.started(f"all_gather b{bucket.spec.id}", buffer.nbytes, work)
        return work


def _contents(bucket: FlatBucket) -> str:
    first, last = bucket.names[0], bucket.names[-1]
    return f"bucket {bucket.spec.id} ({first if first == last else f'{first} .. {last}'})"
