"""The figures of one configuration: memory by kind and place, and bytes a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zerort import _core
from zerort.config import Config
from zerort.forecast.buckets import Buckets, Row
from zerort.forecast.job import Job
from zerort.forecast.legs import Leg, Seating, gather_pieces, lane_pieces, legs_of, reduced
from zerort.forecast.owners import Exchanged, Owners
from zerort.forecast.updates import Updates
from zerort.memory import Kind, Piece, pieces, plannable, shared_pieces
from zerort.start.caps import Cap
from zerort.start.planning import plan_of
from zerort.step.precision import Precision

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """Of one rank, the one that has most."""

    settings: Config
    plan: _core.Plan
    cap: Cap
    """How long a bucket may become."""
    pieces: Sequence[Piece]
    sent: Mapping[str, int]
    """Bytes that a rank sends in a step, and receives as many."""
    to_host: int
    """Bytes that a rank copies in a step."""
    to_device: int
    owners: Owners | None
    """Of whole parameters, where the optimizer asks for such."""
    by_rank: Sequence[int]
    """Bytes that each rank has between steps, on the device and the host together."""
    seating: Seating
    between_hosts: int
    """Of the bytes sent in a step, those between hosts of one copy of the model state."""
    between_copies: int

    @property
    def stage(self) -> int:
        """The configuration's."""
        return self.settings.zero_optimization.stage

    def taken(self, kind: Kind | None = None, *, on_host: bool = False) -> int:
        """Bytes of a kind, of all where it is None."""
        return sum(
            piece.nbytes
            for piece in self.pieces
            if piece.on_host == on_host and kind in (None, piece.kind)
        )

    @property
    def locked(self) -> int:
        """Bytes of page-locked memory of the host, as torch rounds it up."""
        return sum(piece.locked for piece in self.pieces)


@dataclass(frozen=True)
class _Unplaced:
    """The origin of a parameter without values."""

    parameter: nn.Parameter
    is_common = False

    def fill(self, view: Tensor) -> None:
        """It has none."""


def forecast(settings: Config, model: nn.Module, job: Job, micro_batches: int) -> Forecast:
    """Of `model`, on the meta device, which is cast; with `micro_batches` a step.

    Raises `ConfigError` and `PlanError` for what `initialize` would refuse of its parameters.
    """
    precision, seating = Precision.of(settings), Seating.of(settings, job)
    precision.cast(model)
    updates = Updates.of(settings, model, trained_only=job.trained_only)
    numbered = enumerate(group["params"] for group in updates.groups)
    by_id = {id(parameter): index for index, params in numbered for parameter in params}
    named, shards = list(model.named_parameters()), settings.zero_optimization.shards_parameters
    planned = plannable(named, by_id, precision.wires(model), _Unplaced, holds=shards)
    planner, plan = plan_of(
        settings,
        model,
        planned,
        sizes=seating.sizes,
        window=job.window,
        grains_of=updates.grains,
    )
    members = planner.members
    every = settings.reduces_every_micro_batch(plan.reduces_every_micro_batch)
    passes = micro_batches if every else 1
    buckets = Buckets(settings, precision, job, members, plan, updates, micro_batches > passes)
    own, laid = buckets.own(), _Laid.of(settings, plan, buckets.rows(), seating)
    gathered = _Gathered.of(settings, plan, laid.rows)
    inside = {id(member.tensor) for member in members}
    loose = [p for p in model.parameters() if id(p) not in inside]
    alike = list(laid.pieces(job))
    alike += [Piece(Kind.UNPLANNED, t.nbytes) for t in (*loose, *model.buffers())]
    at_rest = sum(piece.nbytes for piece in alike)
    by_rank = [at_rest + nbytes for nbytes in own.by_rank or [0] * job.world]
    fullest = by_rank.index(max(by_rank))
    exchange = Exchanged.of(plan, precision)
    reduced, brought = laid.reduced(passes), laid.brought(micro_batches * gathered.times)
    sent = {
        "gradients": reduced.total(),
        "gradients_to_owners": exchange.there[fullest],
        "parameters_from_owners": exchange.back[fullest],
        "parameters": brought.total(),
    }
    crossing = [reduced[group] + brought[group] for group in ("outer", "replica")]
    traffic = _copied(laid.rows, passes, micro_batches * gathered.times)
    found = [*alike, *own.pieces(fullest, laid.rows), gathered.room]
    owners = Owners.of(plan)
    cap = planner.cap(settings)
    return Forecast(settings, plan, cap, found, sent, *traffic, owners, by_rank, seating, *crossing)


@dataclass(frozen=True)
class _Laid:
    """The buckets of a plan as they lie in memory, and the legs on which they leave."""

    settings: Config
    plan: _core.Plan
    specs: Sequence[_core.Bucket]
    """Made anew each time that they are read off the plan."""
    rows: Sequence[Row]
    legs: Sequence[Sequence[Leg]]
    seating: Seating

    @classmethod
    def of(cls, settings: Config, plan: _core.Plan, rows: Sequence[Row], seating: Seating) -> _Laid:
        """A row for each bucket, in its order."""
        specs = plan.buckets
        pairs = zip(specs, rows, strict=True)
        legs = [legs_of(spec, row[0].dtypes, seating) for spec, row in pairs]
        return cls(settings, plan, specs, rows, legs, seating)

    def pieces(self, job: Job) -> Iterator[Piece]:
        """Of memory that all ranks have alike."""
        for shape, places in self.rows:
            yield from pieces(shape, places)
        yield from shared_pieces(self.rows)
        yield from lane_pieces(self.plan, self.legs, job, self.seating)
        for hops in ("gather_hops", "publish_hops"):
            yield from gather_pieces(list(self._ways(hops)), self.seating)
        yield from self._encoded()
        yield from self._kept()

    def reduced(self, passes: int) -> Counter[str]:
        """Bytes sent of gradients, by group."""
        sent: Counter[str] = Counter()
        for spec, (shape, _), each in zip(self.specs, self.rows, self.legs, strict=True):
            for group, nbytes in reduced(spec, each, shape.dtypes.sums).items():
                sent[group] += passes * nbytes
        return sent

    def brought(self, times: float) -> Counter[str]:
        """Bytes sent for updated parameters, and for those that are gathered so many `times`, by
        group.
        """
        sent: Counter[str] = Counter()
        for hops, nbytes in self._ways("publish_hops"):
            sent += self.seating.gathered(hops, nbytes)
        for hops, nbytes in self._ways("gather_hops"):
            for group, each in self.seating.gathered(hops, nbytes).items():
                once = group == "outer" and self.seating.keeps
                sent[group] += each if once else int(times * each)
        return sent

    def _ways(self, hops: str) -> Iterator[tuple[Sequence[_core.Hop], int]]:
        """Of each bucket's parameters, those of its `hops` and bytes."""
        for spec, (shape, _) in zip(self.specs, self.rows, strict=True):
            yield getattr(spec, hops), spec.numel * shape.dtypes.values.itemsize

    def _encoded(self) -> Iterator[Piece]:
        """What formats of bytes gather a gradient in, and what they keep from step to step."""
        packed = [
            (spec, leg)
            for spec, each in zip(self.specs, self.legs, strict=True)
            for leg in each
            if leg.wire.dtype is None
        ]
        if packed:
            yield Piece(Kind.ON_THEIR_WAY, 4 * max(leg.numel for _, leg in packed))
        for spec, leg in packed if self.settings.wire_feedback else ():
            gathers = any(hop.op == "all_gather" for hop in spec.reduce_hops)
            shard = leg.numel // leg.members
            yield Piece(Kind.FEEDBACK, leg.wire.kept_bytes(shard, leg.members, gathers=gathers))

    def _kept(self) -> Iterator[Piece]:
        """What a gather between hosts has brought of each sharded bucket."""
        for shape, _ in self.rows if self.seating.keeps else ():
            if shape.sharded:
                nbytes = shape.numel // self.seating.ranks * shape.dtypes.values.itemsize
                yield Piece(Kind.KEPT, nbytes)


@dataclass(frozen=True)
class _Gathered:
    """What is whole for a time, where parameters are sharded."""

    room: Piece
    times: float
    """How often all of it is gathered in a micro-batch."""

    @classmethod
    def of(cls, settings: Config, plan: _core.Plan, rows: Sequence[Row]) -> _Gathered:
        """A unit is gathered in the forward and again in the backward, unless there was room."""
        if not plan.units:
            return cls(Piece(Kind.GATHERED, 0), 0)
        whole = sum(unit.numel for unit in plan.units)
        largest = max(unit.numel for unit in plan.units)
        nbytes = sum(s.numel * s.dtypes.values.itemsize for s, _ in rows if s.sharded)
        room = min(whole, max(largest, settings.room(whole, largest)))
        return cls(Piece(Kind.GATHERED, nbytes * room // whole), 2 - room / whole)


def _copied(rows: Iterable[Row], passes: int, gathers: float) -> tuple[int, int]:
    """Between host and device in a step: sums, updated parameters, shards."""
    to_host = to_device = 0.0
    for shape, places in rows:
        item = shape.dtypes.values.itemsize
        if places.state and shape.trained:
            sums = shape.shard * shape.dtypes.sums.itemsize
            to_host += passes * sums
            to_device += (passes - 1) * sums
            to_device += 0 if places.shards else shape.owned * item
        if places.shards:
            to_device += gathers * shape.shard * item
            to_host += shape.shard * item if shape.trained and not places.state else 0
    return int(to_host), int(to_device)
