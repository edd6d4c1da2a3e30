"""A plan as an executor runs it: its list, with memory in place of numbers.

What it guarantees: memory for buckets in flight is allocated here, when a plan is taken, and never
in a step. What it does not do: it starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from zerort import _core
from zerort.device.contract import Streams
from zerort.memory import FlatBucket, FlatModel
from zerort.mesh import Mesh
from zerort.run.flight import Hop, Inflight, Transport
from zerort.run.gathers import Following, UnitFlight
from zerort.run.hops import Pass, gather_hops, gather_ways, reduce_hops
from zerort.run.lanes import LaneMemory, lane_for
from zerort.run.launches import Launches

__all__ = ["Maker", "Program"]

Verb = Callable[[Inflight], None]


@dataclass(frozen=True)
class Program:
    """One plan's."""

    commands: Sequence[tuple[Verb, Verb, Inflight]] = ()
    """The schedule: what to do, how to report it once the cursor has moved, and the bucket."""
    flights: Sequence[Inflight] = ()
    """In the order of their launches."""
    launches_end: int = 0
    """One past the last Launch."""
    units: Mapping[int, UnitFlight] = field(default_factory=dict)
    """What is gathered and freed together, where parameters are sharded."""

    def dissolve(self) -> None:
        """Its flights know one another no more: such a ring would keep their memory until the
        collector comes by.
        """
        for flight in self.flights:
            flight.before = None


class Maker:
    """Makes the programs of one model's plans; `current` is the pass that is under way in any."""

    def __init__(
        self,
        flat: FlatModel,
        mesh: Mesh,
        transports: Mapping[int, Transport],
        streams: Streams,
        current: Pass,
        following: Following,
    ) -> None:
        self._flat = flat
        self._trained = {bucket.spec.id: bucket for bucket in flat.trained}
        self._mesh = mesh
        self._transports = transports
        self._streams = streams
        self._current = current
        self._following = following

    def program(
        self, plan: _core.Plan, launches: Launches, units: Mapping[int, UnitFlight]
    ) -> Program:
        """With the `units` of the program before, if that had any: they do not change. All ranks
        make it, with nothing under way.
        """
        flights = self._flights(plan)
        schedule = plan.schedule
        verbs = {
            "launch": (launches.launch, launches.launched),
            "retire": (launches.retire, launches.retired),
        }
        places = [index for index, (kind, _) in enumerate(schedule) if kind == "launch"]
        return Program(
            [(*verbs[kind], flights[bucket]) for kind, bucket in schedule],
            [flights[schedule[index][1]] for index in places],
            launches_end=places[-1] + 1 if places else 0,
            units=units or self._units(plan),
        )

    def published(self) -> list[tuple[FlatBucket, Sequence[Hop]]]:
        """What is brought to all ranks behind a step, in its order. All ranks make it."""
        found: list[tuple[FlatBucket, Sequence[Hop]]] = [
            (bucket, gather_hops(bucket, hops, self._mesh))
            for bucket in self._flat.trained
            if (hops := bucket.spec.publish_hops)
        ]
        self._mesh.settle()
        return found

    def collect(self) -> None:
        """Gradients of a micro-batch that is not reduced go where they wait."""
        for transport in self._transports.values():
            transport.source.collect()

    def follow(self) -> None:
        """Buckets' memory lies elsewhere."""
        for transport in self._transports.values():
            transport.source.follow()

    def release(self) -> None:
        """Gives back what sources, encoders and sums have, until the next program."""
        for transport in self._transports.values():
            transport.source.rest_in(None)
            for encoder in transport.encoders:
                encoder.release()
        for bucket in self._flat.trained:
            bucket.sums.release()

    def _flights(self, plan: _core.Plan) -> dict[int, Inflight]:
        """By bucket. The n-th launch uses lane n modulo the window."""
        order = [bucket for kind, bucket in plan.schedule if kind == "launch"]
        flights: dict[int, Inflight] = {}
        sharing = [order[position :: plan.window] for position in range(plan.window)]
        lanes = [
            lane_for([self._transports[b] for b in users], self._mesh, self._streams.lane())
            for users in sharing
        ]
        self._mesh.settle()
        for users, lane in zip(sharing, lanes, strict=True):
            for b in users:
                flights[b] = self._flight(self._trained[b], self._transports[b], lane)
            for last, b in zip(users[-1:] + users, users, strict=False):
                flights[b].before = flights[last] if lane.shared else None
        return flights

    def _flight(self, bucket: FlatBucket, transport: Transport, lane: LaneMemory) -> Inflight:
        hops = reduce_hops(bucket, transport, lane, self._mesh, self._current)
        return Inflight(bucket, hops, lane.lane)

    def _units(self, plan: _core.Plan) -> dict[int, UnitFlight]:
        buckets = self._flat.buckets

        def flight(unit: _core.Unit) -> UnitFlight:
            members = [buckets[b] for b in unit.buckets]
            return UnitFlight(unit, members, gather_ways(members, self._mesh), self._following)

        units = {unit.id: flight(unit) for unit in plan.units}
        self._mesh.settle()  # what units have stays when the rest is made anew
        return units
