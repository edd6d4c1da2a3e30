"""Runs the schedule: Launch starts a bucket's collective, Retire takes its result.

What it guarantees: commands run in the order of the list and never before the core has allowed
them; memory and collectives of a bucket stay alive together until the last result has been taken;
no hook ever blocks (RED-5). Where waiting blocks the host, a command whose bucket or memory is
still under way ends the run, and only `drain` waits; where it does not, the wait is enqueued on the
device and the run goes on. A bucket's second collective does not wait for the run: it starts at the
next command behind the end of the first (SCH-4).

What has started is not started again: whatever raises between two lines, Ctrl-C included, the next
call goes on with the command at the cursor, and a command that runs twice has its effect once. The
pass is lost all the same, so from then on zeros are sent, and `failure` says why the vote must be
lost. `launch_all`, `drain` and `publish` come to their end before they let an exception out; where
a publication is overlapped, its end is that all has been sent.

Where parameters are sharded there is no one list: the core hands out *actions*, of forwards too,
which queue up behind one another (`run.actions`).

What it does not do: it decides nothing about the order, and it does not know what a step is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from zerort import _core
from zerort.device import device_for
from zerort.errors import CommError
from zerort.memory import FlatBucket, FlatModel
from zerort.mesh import Mesh
from zerort.run.actions import Action, Actions, Verb
from zerort.run.changes import Changes
from zerort.run.empty import EmptyPass
from zerort.run.flight import Hop, Transport
from zerort.run.gathers import Following, Gathers, UnitFlight
from zerort.run.hops import Fold, Pass
from zerort.run.launches import Launches
from zerort.run.program import Maker, Program
from zerort.run.publication import UNGUARDED, Guard, Publication
from zerort.run.secondary import Replaced
from zerort.run.waits import Waits
from zerort.trace.watch import Watch

__all__ = ["Executor", "Fold"]

Done = Callable[[Any], None]
"""What is done with a bucket or a unit."""


class Executor:
    """A second cursor into the schedule: what has run, behind what is allowed to."""

    def __init__(
        self, flat: FlatModel, mesh: Mesh, transports: Mapping[int, Transport], watch: Watch
    ) -> None:
        self.device = device_for(mesh.device)
        self.streams = self.device.streams()
        self.waits = Waits(mesh.job, watch, blocks=self.device.blocks)
        self.changes = Changes()
        """What was written into parameters while they were whole."""
        self._flat = flat
        self._lock = threading.Lock()
        self._pass = Pass()
        self._mesh = mesh
        self._following = Following(self.waits, blocks=self.device.blocks)
        self.send_by(transports)
        self._program = Program()
        self._guard: Guard = UNGUARDED
        self._needed: Sequence[int] = ()
        self.publication = self._publish(())
        """How updated shards reach all ranks."""
        self._cursor = self._allowed = 0
        blocks = self.device.blocks
        self._launches = Launches(self.streams, self.waits, self._pass, blocks=blocks)
        self._gathers = Gathers(self.waits, self.changes, mesh.rank, blocks=blocks)
        self._actions = Actions(polls=blocks)
        self.replaced = Replaced(())
        """What this rank has put in the place of sharded values, for gathers inside a host."""
        self._forgets: Sequence[int] = ()

    @property
    def watch(self) -> Watch:
        """What hears of collectives."""
        return self.waits.watch

    # The plan.

    def send_by(self, transports: Mapping[int, Transport]) -> None:
        """How buckets leave this rank from the next `load` on; the model may have others."""
        self._maker = Maker(
            self._flat, self._mesh, transports, self.streams, self._pass, self._following
        )

    def load(self, plan: _core.Plan) -> None:
        """Takes the plan's schedule; memory for buckets in flight is allocated here and never in a
        step.
        """
        units = self._program.units
        self.publication.land()
        if self._program.flights:
            self._give_back({})  # before the new is asked for
        self._program = self._maker.program(plan, self._launches, units)
        self._launches.load(self._program.flights)
        self.publication = self._publish(self._maker.published())
        self._actions.load(self._table())
        if self._program.units and not units:
            self._keep_secondaries()
        self._cursor = self._allowed = 0

    def _keep_secondaries(self) -> None:
        kept = [bucket for bucket in self._flat.buckets if bucket.secondary is not None]
        self.replaced = Replaced(kept)
        units = sorted({bucket.spec.unit for bucket in kept if bucket.spec.unit is not None})
        self._forgets = [*map(Verb.FORGET.of, units)]

    def _publish(self, hops: Sequence[tuple[FlatBucket, Sequence[Hop]]]) -> Publication:
        """Of these buckets, what is needed first in front."""
        place = {param: index for index, param in enumerate(self._needed)}
        last = len(place)

        def first_need(bucket: FlatBucket) -> tuple[int, int]:
            # until more is known: buckets are planned in the order of a backward
            return min(place.get(p, last) for p in bucket.spec.params), -bucket.spec.id

        ordered = sorted(hops, key=lambda pair: first_need(pair[0]))
        here = None if self.device.blocks else self.streams.here
        publication = Publication(ordered, self.waits, here)
        publication.guard = self._guard
        return publication

    def guard_by(self, guard: Guard) -> None:
        """Who keeps others from parameters whose updates are on their way. Nothing is."""
        self._guard = self.publication.guard = guard

    def need(self, order: Sequence[int]) -> None:
        """Parameters in the order in which forwards need them, for the next `load`; the same on all
        ranks.
        """
        self._needed = order

    def unload(self) -> None:
        """Gives the memory of buckets in flight back, until `load`. Nothing is under way."""
        self.publication.land()
        self._give_back(self._program.units)

    def close(self) -> None:
        """Gives all of it back; nothing runs any more."""
        for unit in self._program.units.values():
            unit.close()
        self._give_back(self._program.units)

    def _give_back(self, units: Mapping[int, UnitFlight]) -> None:
        self._program.dissolve()
        self._program = Program(units=units)
        self.publication = self._publish(())
        self._launches.load(())
        self._actions.load(self._table())
        self._maker.release()

    def follow(self) -> None:
        """Buckets' memory lies elsewhere."""
        self._maker.follow()

    def _table(self) -> dict[int, Action]:
        """By the core's number."""
        buckets = {flight.bucket.spec.id: flight for flight in self._program.flights}
        launches, gathers = self._launches, self._gathers
        verbs: list[tuple[Verb, Done, Done, Mapping[int, Any]]] = [
            (Verb.LAUNCH, launches.launch, launches.launched, buckets),
            (Verb.RETIRE, launches.retire, launches.retired, buckets),
            (Verb.GATHER, self._gather, gathers.gathering, self._program.units),
            (Verb.FREE, gathers.free, gathers.freed, self._program.units),
            (Verb.FORGET, UnitFlight.forget, _unseen, self._program.units),
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
        self._launches.begin()
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
            self._following.advance()

    def forget(self, units: Sequence[int] | None = None) -> None:
        """Behind what is queued: the next gathers of `units`, of all where None, are from all
        ranks. They do so at the same place of their gathers.
        """
        if self._forgets:
            all_of = self._forgets if units is None else [*map(Verb.FORGET.of, units)]
            self.enqueue(all_of)

    def reach(self) -> None:
        """Starts all that is queued; waits only where memory is in use."""
        with self._lock:
            _to_the_end(self._reach)
        self.streams.packed()

    def land(self, units: Sequence[int]) -> None:
        """Waits for the values of `units`, whose gathers have started."""
        with self._lock:
            for number in units:
                self._gathers.land(self._program.units[number])

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
            self._maker.collect()
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

    def publish_ready(self, ready: Collection[int], *, overlapped: bool) -> None:
        """Begins to bring updated shards to all ranks, of buckets by their number."""
        self.publication.start(self._flat.state + 1, ready, guarded=overlapped)

    def publish(self, *, overlapped: bool) -> None:
        """Brings every rank's updated shard to all ranks; waits unless that is `overlapped`."""
        turn = self._flat.state + 1

        def run() -> None:
            self.publication.launch(turn, guarded=overlapped)
            if not overlapped:
                self.publication.land()

        try:
            _to_the_end(run)
        finally:
            self._flat.published()

    # The cursor.

    def _advance(self, end: int, *, wait: bool) -> None:
        polls = self.device.blocks and not wait
        self._follow_up()
        while self._cursor < end:
            verb, report, flight = self._program.commands[self._cursor]
            if polls and flight.under_way:
                return
            try:
                verb(flight)
            except BaseException as error:
                self._lose(error)
                raise
            self._cursor += 1
            report(flight)
            self._follow_up()

    def _follow_up(self) -> None:
        try:
            self._launches.follow_up()
        except BaseException as error:
            self._lose(error)
            raise

    def _reach(self) -> None:
        self._actions.advance(wait=True)
        self._actions.follow()
        with self.waits.naming("all_gather between hosts"):
            self._following.reach()

    def _drain(self) -> None:
        self._actions.drain()
        self._advance(self._allowed, wait=True)
        # hop by hop, so that the next one's collectives are under way together
        while waiting := [flight for flight in self._program.flights if flight.state.hop > 0]:
            for flight in waiting:
                self._launches.proceed(flight)

    def _gather(self, unit: UnitFlight) -> None:
        self._gathers.gather(unit, self._actions.serial)

    def _whole_or_lost(self, verb: Done) -> Done:
        """`verb`, which loses the window where it raises."""

        def run(subject: Any) -> None:
            try:
                verb(subject)
            except BaseException as error:
                self._lose(error)
                raise

        return run

    def _lose(self, error: BaseException) -> None:
        self.poison(f"{type(error).__name__}: {error}")


def _unseen(unit: UnitFlight) -> None:
    """The watch hears nothing of it."""


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
