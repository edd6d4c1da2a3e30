"""Runs the schedule: Launch starts a bucket's collective, Retire takes its result.

What it guarantees: commands run in the order of the list and never before the core has allowed
them; memory and collectives of a bucket stay alive together until the last result has been taken;
no hook ever blocks (RED-5). Where waiting blocks the host, a command whose bucket or memory is
still under way ends the run, and only `drain` waits; where it does not, the wait is enqueued on the
device and the run goes on.

What has started is not started again: whatever raises between two lines, Ctrl-C included, the next
call goes on with the command at the cursor, and a command that runs twice has its effect once. The
pass is lost all the same, so from then on zeros are sent, and `failure` says why the vote must be
lost. `launch_all`, `drain` and `publish` come to their end before they let an exception out.

Where parameters are sharded there is no one list: the core hands out *actions*, of forwards too,
which queue up behind one another (`run.actions`).

What it does not do: it decides nothing about the order, and it does not know what a step is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zerort import _core
from zerort.device import device_for
from zerort.errors import CommError
from zerort.memory import FlatBucket, FlatModel
from zerort.mesh import Mesh
from zerort.run.actions import Action, Actions
from zerort.run.actions import Verb as Kind
from zerort.run.changes import Changes
from zerort.run.empty import EmptyPass
from zerort.run.flight import FIRST, OVER, Hop, Inflight, LaneMemory, Transport, lane_for
from zerort.run.gathers import UnitFlight
from zerort.run.hops import PUBLISH, REDUCE, Fold, Pass
from zerort.run.publication import Publication
from zerort.run.waits import Waits, called, contents
from zerort.trace.watch import Watch

__all__ = ["Executor", "Fold"]

Verb = Callable[[Inflight], None]


@dataclass(frozen=True)
class Program:
    """A plan's schedule with verbs and memory in place of kinds and numbers."""

    commands: Sequence[tuple[Verb, Verb, Inflight]] = ()
    """What to do, how to report it once the cursor has moved, and the bucket."""
    flights: Sequence[Inflight] = ()
    """In the order of their launches."""
    launches_end: int = 0
    """One past the last Launch."""
    units: Mapping[int, UnitFlight] = field(default_factory=dict)
    """What is gathered and freed together, where parameters are sharded."""


class Executor:
    """A second cursor into the schedule: what has run, behind what is allowed to."""

    def __init__(
        self, flat: FlatModel, mesh: Mesh, transports: Mapping[int, Transport], watch: Watch
    ) -> None:
        self.device = device_for(mesh.device)
        self.streams = self.device.streams()
        self.watch = watch
        self.waits = Waits(mesh.shard, watch, blocks=self.device.blocks)
        self._flat = flat
        self._trained = {bucket.spec.id: bucket for bucket in flat.trained}
        self._mesh = mesh
        self._comm = mesh.shard
        self._transports = transports
        self._lock = threading.Lock()
        self._program = Program()
        self._publication = Publication((), self.waits)
        self._cursor = self._allowed = 0
        self._pass = Pass()
        self._actions = Actions(polls=self.device.blocks)
        self.changes = Changes()
        """What was written into parameters while they were whole."""

    # The plan.

    def load(self, plan: _core.Plan) -> None:
        """Takes the plan's schedule; memory for buckets in flight is allocated here and never in a
        step.
        """
        units = self._program.units
        for flight in self._program.flights:
            flight.before = None  # a ring would keep its memory until the collector comes by
        self._program = Program()  # whose memory goes before the new is asked for
        flights = self._flights(plan)
        verbs = {"launch": (self._launch, self._launched), "retire": (self._retire, self._retired)}
        schedule = plan.schedule
        launches = [index for index, (kind, _) in enumerate(schedule) if kind == "launch"]
        self._program = Program(
            [(*verbs[kind], flights[bucket]) for kind, bucket in schedule],
            [flights[schedule[index][1]] for index in launches],
            launches_end=launches[-1] + 1 if launches else 0,
            units=units or self._units(plan),
        )
        self._publication = Publication(self._published(), self.waits)
        self._actions.load(self._table())
        self._cursor = self._allowed = 0

    def unload(self) -> None:
        """Gives the memory of buckets in flight back, until `load`. Nothing is under way."""
        for flight in self._program.flights:
            flight.before = None
        self._program = Program(units=self._program.units)
        self._actions.load(self._table())
        for transport in self._transports.values():
            transport.source.rest_in([])
            transport.encoder.release()
        for bucket in self._flat.trained:
            bucket.sums.release()

    def follow(self) -> None:
        """Buckets' memory lies elsewhere."""
        for transport in self._transports.values():
            transport.source.follow()

    def _flights(self, plan: _core.Plan) -> dict[int, Inflight]:
        """By bucket. The n-th launch uses lane n modulo the window."""
        order = [bucket for kind, bucket in plan.schedule if kind == "launch"]
        flights: dict[int, Inflight] = {}
        for position in range(plan.window):
            users = order[position :: plan.window]
            sizes = [(self._trained[b], self._transports[b].wire) for b in users]
            lane = lane_for(sizes, self._comm, self.streams.lane())
            for b in users:
                flights[b] = self._flight(self._trained[b], self._transports[b], lane)
            for last, b in zip(users[-1:] + users, users, strict=False):
                flights[b].before = flights[last] if lane.shared else None
        return flights

    def _flight(self, bucket: FlatBucket, transport: Transport, lane: LaneMemory) -> Inflight:
        buffers = lane.buffers(bucket, transport.wire, self._comm)
        transport.encoder.bind(buffers)
        transport.source.rest_in(transport.encoder.slots)
        hops = [
            REDUCE[hop.op](self._mesh[hop.group], bucket, transport, buffers, self._pass)
            for hop in bucket.spec.reduce_hops
        ]
        return Inflight(bucket, hops, lane.lane)

    def _published(self) -> list[tuple[FlatBucket, Sequence[Hop]]]:
        return [
            (bucket, [PUBLISH[hop.op](self._mesh[hop.group], bucket) for hop in hops])
            for bucket in self._flat.trained
            if (hops := bucket.spec.publish_hops)
        ]

    def _units(self, plan: _core.Plan) -> dict[int, UnitFlight]:
        return {
            unit.id: UnitFlight(unit, [self._flat.buckets[b] for b in unit.buckets], self._comm)
            for unit in plan.units
        }

    def _table(self) -> dict[int, Action]:
        """By the core's number."""
        buckets = {flight.bucket.spec.id: flight for flight in self._program.flights}
        verbs: list[tuple[Kind, Callable[[Any], None], Callable[[Any], None], Any]] = [
            (Kind.LAUNCH, self._launch, self._launched, buckets),
            (Kind.RETIRE, self._retire, self._retired, buckets),
            (Kind.GATHER, self._gather, self._gathering, self._program.units),
            (Kind.FREE, self._free, self._freed, self._program.units),
        ]
        return {
            kind.of(number): Action(kind, self._whole_or_lost(verb), report, subject)
            for kind, verb, report, subjects in verbs
            for number, subject in subjects.items()
        }

    # A pass.

    def begin(self, fold: Fold) -> None:
        """Starts at the head of the list."""
        self._pass.fold = fold
        self._pass.absent = []
        self._cursor = self._allowed = 0

    def run(self, hi: int) -> None:
        """Runs what is below `hi` as far as it goes without blocking. Called from hooks, on any
        thread.
        """
        with self._lock:
            self._allowed = max(self._allowed, hi)
            self._advance(self._allowed, wait=False)

    def enqueue(self, actions: Sequence[int]) -> None:
        """Queues what the core has handed out, and runs what goes without blocking."""
        with self._lock:
            self._actions.append(actions)
            self._actions.advance(wait=False)

    def reach(self) -> None:
        """Starts all that is queued; waits only where memory is in use."""
        with self._lock:
            _to_the_end(lambda: self._actions.advance(wait=True))
        self.streams.packed()

    def land(self, units: Sequence[int]) -> None:
        """Waits for the values of `units`, whose gathers have started."""
        with self._lock:
            for number in units:
                unit = self._program.units[number]
                if not self.device.blocks or unit.under_way:
                    with self.waits.waiting(f"all_gather of {unit.contents}"):
                        self._land(unit)
                else:
                    self._land(unit)

    def unit(self, number: int) -> UnitFlight:
        """A unit's memory."""
        return self._program.units[number]

    def launch_all(self) -> None:
        """Runs the list as far as its last Launch; waits only where the window has no room."""
        with self._lock:
            self._allowed = len(self._program.commands)
            _to_the_end(lambda: self._advance(self._program.launches_end, wait=True))
            self._advance(self._allowed, wait=False)
        self.streams.packed()

    def drain(self) -> None:
        """Runs all that is allowed, waiting where it must; then the accumulators may be read."""
        with self._lock:
            _to_the_end(self._drain)
        if self.device.blocks:
            return
        with self.waits.waiting("reduced gradients"):
            self.streams.join()

    def collect(self) -> None:
        """A micro-batch that is not reduced is over: its gradients go where they wait."""
        self.drain()  # a pass may still be sending from there
        with self.streams.packing(None):
            for transport in self._transports.values():
                transport.source.collect()
        self.streams.packed()

    def empty(self, failure: str) -> EmptyPass:
        """Starts a pass that no backward has begun, once the last one is over; the window is lost
        by `failure`.
        """
        self.poison(failure)
        return EmptyPass(self._program.flights, self.streams)

    def poison(self, failure: str) -> None:
        """The window is lost on this rank: what is left of the list runs on zeros."""
        self._pass.failure = self._pass.failure or failure

    def reset(self) -> None:
        """The window is over."""
        self._pass.nonfinite = self._pass.failure = None

    @property
    def absent(self) -> list[str]:
        """Parameters that require grad and had none when their bucket was packed in this pass."""
        return self._pass.absent

    @property
    def nonfinite(self) -> tuple[int, int] | None:
        """(rank, parameter) of the first infinity or NaN that arrived in this window."""
        return self._pass.nonfinite

    @property
    def failure(self) -> str | None:
        """Why the window is lost on this rank, if it is."""
        return self._pass.failure

    def publish_ready(self, ready: Collection[int]) -> None:
        """Begins to bring updated shards to all ranks, of buckets by their number."""
        self._publication.start(ready)

    def publish(self) -> None:
        """Brings every rank's updated shard to all ranks, and waits."""
        try:
            _to_the_end(self._publication.finish)
        finally:
            self._flat.published()

    # The cursor.

    def _advance(self, end: int, *, wait: bool) -> None:
        polls = self.device.blocks and not wait
        while self._cursor < end:
            verb, report, flight = self._program.commands[self._cursor]
            if polls and flight.under_way:
                return
            self._whole_or_lost(verb)(flight)
            self._cursor += 1
            report(flight)

    def _drain(self) -> None:
        self._actions.drain()
        self._advance(self._allowed, wait=True)
        for flight in self._program.flights:
            if flight.state.hop > 0:
                self._finish(flight)

    def _whole_or_lost(self, verb: Callable[[Any], None]) -> Callable[[Any], None]:
        """`verb`, which loses the window where it raises."""

        def run(subject: Any) -> None:
            try:
                verb(subject)
            except BaseException as error:
                self.poison(f"{type(error).__name__}: {error}")
                raise

        return run

    def _gather(self, unit: UnitFlight) -> None:
        if self.device.blocks and unit.under_way:  # elsewhere what follows is enqueued behind it
            with self.waits.waiting(f"all_gather of {unit.contents}"):
                self._land(unit)
        try:
            unit.gather(self._actions.serial)
        except (RuntimeError, MemoryError) as error:
            if not _is_lack_of_memory(error):
                raise
            raise CommError(
                f"rank {self._comm.rank}: no memory for the {unit.nbytes} bytes of "
                f"{unit.contents}: give parameters less room, in "
                "zero_optimization.stage3_max_live_parameters, make buckets smaller, or use more "
                f"ranks. {error}"
            ) from error

    def _free(self, unit: UnitFlight) -> None:
        if self.device.blocks and unit.under_way:  # elsewhere what follows is enqueued behind it
            with self.waits.waiting(f"all_gather of {unit.contents}"):
                self._land(unit)
        unit.free(self.changes)

    def _launch(self, flight: Inflight) -> None:
        before = flight.before
        if before is not None and before.state.hop > 0:
            self._finish(before)
        if flight.state is OVER:
            flight.state = FIRST
        if not self.device.blocks:
            with self.waits.waiting(f"room for {contents(flight.bucket)}"):
                self.streams.make_room(flight.lane)
        with self.streams.packing(flight.lane):
            flight.start()

    def _retire(self, flight: Inflight) -> None:
        if flight.state.hop == 0:
            self._complete(flight)
        if flight.state.hop > 0:
            self._follow(flight)

    def _finish(self, flight: Inflight) -> None:
        """Makes the hops that follow the first."""
        while flight.state.hop > 0:
            self._follow(flight)
            self._complete(flight)

    def _follow(self, flight: Inflight) -> None:
        """Starts a hop that follows the first, unless that has been done."""
        with self.streams.summing(flight.lane):
            flight.start()

    def _complete(self, flight: Inflight) -> None:
        """Waits for the hop that is under way and takes its result."""
        work = flight.state.work
        with self.streams.summing(flight.lane):
            if work is not None:
                self.waits.complete(work, f"{flight.hop.name} of {contents(flight.bucket)}")
                self.waits.landed(flight)
            if self._pass.failure is None:
                flight.take()
            else:
                flight.pass_over()

    # What the watch hears.

    def _launched(self, flight: Inflight) -> None:
        if self.watch.enabled:
            sent = flight.hop.buffer
            self.watch.launched(flight.bucket.spec, sent.nbytes, sent.dtype)
            self.waits.started(flight)

    def _retired(self, flight: Inflight) -> None:
        if self.watch.enabled:
            self.watch.retired(flight.bucket.spec)
            self.waits.started(flight)

    def _gathering(self, unit: UnitFlight) -> None:
        if self.watch.enabled:
            self.watch.gathered(unit.unit, unit.nbytes)
            for flight in unit.flights:
                self.waits.started(flight)

    def _freed(self, unit: UnitFlight) -> None:
        if self.watch.enabled and not unit.pinned:
            self.watch.freed(unit.unit.id)

    def _land(self, unit: UnitFlight) -> None:
        """Waits for what is under way of a unit."""
        if not self.watch.enabled:
            unit.land()
            return
        names = [called(flight) for flight in unit.flights if flight.state is not OVER]
        unit.land()
        for name in names:
            self.watch.landed(name)


def _to_the_end(run: Callable[[], None]) -> None:
    """Calls `run`, once more where something breaks it off, and raises that then.

    What a peer waits for is done before an exception is let out: after it nothing is in flight.
    """
    try:
        run()
    except CommError:
        raise  # there is no peer left to do it for
    except BaseException:
        run()
        raise


def _is_lack_of_memory(error: Exception) -> bool:
    # torch has a class of its own for an accelerator's memory, and none for the host's
    lacks = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return lacks or "allocate memory" in str(error)
