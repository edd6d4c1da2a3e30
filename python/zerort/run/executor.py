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

from zerort import _core
from zerort.device import device_for
from zerort.errors import CommError
from zerort.memory import FlatModel
from zerort.mesh import Mesh
from zerort.run.cursor import Cursor
from zerort.run.empty import EmptyPass
from zerort.run.flight import Transport
from zerort.run.gathers import UnitFlight
from zerort.run.hops import Fold, Pass
from zerort.run.launches import Launches
from zerort.run.program import Maker, Program
from zerort.run.publication import Publication
from zerort.run.units import Units
from zerort.run.waits import Waits
from zerort.trace.watch import Watch

__all__ = ["Executor", "Fold"]


class Executor:
    """Of one engine: what runs of its schedule, under one lock."""

    def __init__(
        self, flat: FlatModel, mesh: Mesh, transports: Mapping[int, Transport], watch: Watch
    ) -> None:
        self.device = device_for(mesh.device)
        self.streams = self.device.streams()
        blocks = self.device.blocks
        self.waits = Waits(mesh.job, watch, blocks=blocks)
        self.current = Pass()
        """The pass that is under way, and what holds until its window is over."""
        self.units = Units(self.waits, self.current, mesh.rank, blocks=blocks)
        self.publication = Publication(self.waits, None if blocks else self.streams.here)
        """How updated shards reach all ranks."""
        self._flat = flat
        self._mesh = mesh
        self._lock = threading.Lock()
        self._launches = Launches(self.streams, self.waits, self.current, blocks=blocks)
        self._cursor = Cursor(self._launches, self.current, polls=blocks)
        self._program = Program()
        self.send_by(transports)

    @property
    def watch(self) -> Watch:
        """What hears of collectives."""
        return self.waits.watch

    # The plan.

    def send_by(self, transports: Mapping[int, Transport]) -> None:
        """How buckets leave this rank from the next `load` on; the model may have others."""
        self._maker = Maker(
            self._flat, self._mesh, transports, self.streams, self.current, self.units.following
        )

    def load(self, plan: _core.Plan) -> None:
        """Takes the plan's schedule; memory for buckets in flight is allocated here and never in a
        step.
        """
        self.publication.land()
        if self._program.flights:
            self._give_back()  # before the new is asked for
        self._take(self._maker.program(plan, self._launches, self._program.units))
        self.publication.load(self._maker.published())

    def unload(self) -> None:
        """Gives the memory of buckets in flight back, until `load`. Nothing is under way."""
        self.publication.land()
        self._give_back()

    def close(self) -> None:
        """Gives all of it back; nothing runs any more."""
        self.units.close()
        self._give_back()

    def _give_back(self) -> None:
        self._program.dissolve()
        self.publication.load(())
        self._take(Program(units=self._program.units))
        self._maker.release()

    def _take(self, program: Program) -> None:
        self._program = program
        self._cursor.load(program)
        self.units.load(program, self._launches, self._flat)

    def follow(self) -> None:
        """Buckets' memory lies elsewhere."""
        self._maker.follow()

    # A pass.

    def begin(self, fold: Fold) -> None:
        """Starts at the head of the list."""
        self.current.fold = fold
        self.current.absent = []
        self._cursor.begin()

    def run(self, hi: int) -> None:
        """Runs what is below `hi` as far as it goes without blocking. Called from hooks, on any
        thread.
        """
        with self._lock, self.waits.reducing:
            self._cursor.allow(hi)

    def enqueue(self, actions: Sequence[int]) -> None:
        """Queues what the core has handed out, and runs what goes without blocking."""
        with self._lock:
            self.units.enqueue(actions)

    def forget(self, units: Sequence[int] | None = None) -> None:
        """Behind what is queued: the next gathers of `units`, of all where None, are from all
        ranks. They do so at the same place of their gathers.
        """
        if actions := self.units.forgetting(units):
            self.enqueue(actions)

    def reach(self) -> None:
        """Starts all that is queued; waits only where memory is in use."""
        with self._lock:
            _to_the_end(self.units.reach)
        self.streams.packed()

    def land(self, units: Sequence[int]) -> None:
        """Waits for the values of `units`, whose gathers have started."""
        with self._lock:
            self.units.land(units)

    def unit(self, number: int) -> UnitFlight:
        """A unit's memory."""
        return self._program.units[number]

    def launch_all(self) -> None:
        """Runs the list as far as its last Launch; waits only where the window has no room."""
        with self._lock, self.waits.reducing:
            _to_the_end(self._cursor.launch_all)
            self._cursor.allow_all()
        self.streams.packed()

    def drain(self) -> None:
        """Runs all that is allowed, waiting where it must; then the accumulators may be read."""
        with self._lock, self.waits.reducing:
            _to_the_end(self._drain)
        if self.device.blocks:
            return
        with self.waits.waiting("reduced gradients"):
            self.streams.join()

    def _drain(self) -> None:
        self.units.drain()
        self._cursor.drain()

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
        self.current.poison(failure)
        return EmptyPass(self._program.flights, self.streams)

    # Behind a step.

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
