"""The figures of one configuration: memory by kind and place, and bytes a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zerort import _core
from zerort.config import Config
from zerort.forecast.buckets import Buckets, Row
from zerort.forecast.job import Job
from zerort.forecast.owners import Exchanged, Owners
from zerort.forecast.updates import Updates
from zerort.memory import Kind, Piece, pieces, shared_pieces
from zerort.mesh.shared import gathers_bytes, scatters_bytes
from zerort.start.planning import Sizes, plan_of
from zerort.step.precision import Precision
from zerort.wire import WireFormat, format_of

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """Of one rank, the one that has most."""

    settings: Config
    plan: _core.Plan
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
    precision = Precision.of(settings)
    precision.cast(model)
    updates = Updates.of(settings, model, trained_only=job.trained_only)
    numbered = enumerate(group["params"] for group in updates.groups)
    by_id = {id(parameter): index for index, params in numbered for parameter in params}
    planner, plan = plan_of(
        settings,
        model,
        by_id,
        precision.wires(model),
        _Unplaced,
        sizes=Sizes(job.world),
        window=job.window,
        grains_of=updates.grains,
    )
    members = planner.members
    every = settings.reduces_every_micro_batch(plan.reduces_every_micro_batch)
    passes = micro_batches if every else 1
    buckets = Buckets(settings, precision, job, members, plan, updates, micro_batches > passes)
    rows, own = buckets.rows(), buckets.own()
    gathered = _Gathered.of(settings, plan, rows)
    planned = {id(member.tensor) for member in members}
    loose = [p for p in model.parameters() if id(p) not in planned]
    alike = [piece for shape, places in rows for piece in pieces(shape, places)]
    alike += [
        *shared_pieces(rows),
        *_in_flight(settings, plan, job, rows),
        *_encoded(settings, plan),
    ]
    alike += [Piece(Kind.UNPLANNED, t.nbytes) for t in (*loose, *model.buffers())]
    at_rest = sum(piece.nbytes for piece in alike)
    by_rank = [at_rest + nbytes for nbytes in own.by_rank or [0] * job.world]
    fullest = by_rank.index(max(by_rank))
    part, exchange = _Part(job.world), Exchanged.of(plan, precision)
    sent = {
        "gradients": passes * sum(_reduced(spec, rows, part) for spec in plan.buckets),
        "gradients_to_owners": exchange.there[fullest],
        "parameters_from_owners": exchange.back[fullest],
        "parameters": sum(_published(spec, rows, part) for spec in plan.buckets)
        + part.of(micro_batches * gathered.brought),
    }
    traffic = _copied(rows, passes, micro_batches * gathered.times)
    found = [*alike, *own.pieces(fullest, rows), gathered.room]
    return Forecast(settings, plan, found, sent, *traffic, Owners.of(plan), by_rank)


@dataclass(frozen=True)
class _Part:
    """What a rank sends of a bucket, to reduce it or to gather it."""

    world: int

    def of(self, nbytes: float) -> int:
        """(N-1)/N."""
        return int(nbytes * (self.world - 1) / self.world)


@dataclass(frozen=True)
class _Gathered:
    """What is whole for a time, where parameters are sharded."""

    room: Piece
    brought: float
    """Bytes that are gathered in a micro-batch, all ranks' parts."""
    times: float
    """How often that is all of them."""

    @classmethod
    def of(cls, settings: Config, plan: _core.Plan, rows: Sequence[Row]) -> _Gathered:
        """A unit is gathered in the forward and again in the backward, unless there was room."""
        if not plan.units:
            return cls(Piece(Kind.GATHERED, 0), 0, 0)
        whole = sum(unit.numel for unit in plan.units)
        largest = max(unit.numel for unit in plan.units)
        nbytes = sum(s.numel * s.dtypes.values.itemsize for s, _ in rows if s.sharded)
        room = min(whole, max(largest, settings.room(whole, largest)))
        times = 2 - room / whole
        return cls(Piece(Kind.GATHERED, nbytes * room // whole), times * nbytes, times)


def _in_flight(
    settings: Config, plan: _core.Plan, job: Job, rows: Sequence[Row]
) -> Iterator[Piece]:
    """What collectives send from and receive into, beside the values and the sums."""
    if not job.shares(settings):
        yield from (Piece(Kind.ON_THEIR_WAY, nbytes) for nbytes in _lanes(plan, job.pieces))
        return
    for nbytes in _lanes(plan, 1):
        yield Piece(Kind.ON_THEIR_WAY, scatters_bytes(nbytes))
    for hops in ("gather_hops", "publish_hops"):
        shards = [
            spec.shard_numel * rows[spec.id][0].dtypes.values.itemsize
            for spec in plan.buckets
            if getattr(spec, hops)
        ]
        yield Piece(Kind.ON_THEIR_WAY, gathers_bytes(shards))


def _lanes(plan: _core.Plan, pieces: int) -> Iterator[int]:
    """Bytes of each memory of buckets in flight: the n-th launch uses lane n modulo the window."""
    specs = plan.buckets  # made anew each time that it is read
    order = [specs[bucket] for kind, bucket in plan.schedule if kind == "launch"]
    for position in range(plan.window):
        users = order[position :: plan.window]
        shards = [_wire(spec).shard_bytes(spec.shard_numel) for spec in users]
        if shards:
            yield plan.world * max(shards)
        if shards and pieces > 1:
            yield pieces * max(shards)


def _encoded(settings: Config, plan: _core.Plan) -> Iterator[Piece]:
    """What formats of bytes gather a gradient in, and what they keep from step to step."""
    packed = [spec for spec in plan.buckets if spec.reduce_hops and _wire(spec).dtype is None]
    if packed:
        yield Piece(Kind.ON_THEIR_WAY, 4 * max(spec.numel for spec in packed))
    for spec in packed if settings.wire_feedback else ():
        gathers = any(hop.op == "all_gather" for hop in spec.reduce_hops)
        kept = _wire(spec).kept_bytes(spec.shard_numel, plan.world, gathers=gathers)
        yield Piece(Kind.FEEDBACK, kept)


def _wire(spec: _core.Bucket) -> WireFormat:
    return format_of(spec.wire)


def _reduced(spec: _core.Bucket, rows: Sequence[Row], part: _Part) -> int:
    """Sent once for a bucket's gradient."""
    wire, sums = _wire(spec), rows[spec.id][0].dtypes.sums
    encoded = part.world * wire.shard_bytes(spec.shard_numel)
    rounds = wire.shard_bytes(spec.shard_numel) < spec.shard_numel * sums.itemsize
    by_op = {
        "reduce_scatter": encoded,
        "all_gather": encoded if rounds else spec.numel * sums.itemsize,
    }
    return sum(part.of(by_op[hop.op]) for hop in spec.reduce_hops)


def _published(spec: _core.Bucket, rows: Sequence[Row], part: _Part) -> int:
    """Sent for a bucket's updated parameters."""
    item = rows[spec.id][0].dtypes.values.itemsize
    return sum(part.of(spec.numel * item) for _ in spec.publish_hops)


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
