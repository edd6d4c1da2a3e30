"""The figures of one configuration: memory by kind and place, and bytes a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zerort import _core, optim
from zerort.config import Config
from zerort.errors import ConfigError
from zerort.memory import (
    Dtypes,
    Homes,
    Kind,
    Piece,
    Places,
    PlannedParameter,
    Shape,
    pieces,
    shared_pieces,
)
from zerort.mesh.nccl import NcclComm
from zerort.start.planning import plan_of
from zerort.step.precision import Precision
from zerort.wire import WireFormat, format_of
from zerort.zero.estimates import state_bytes

__all__ = ["Forecast", "Job", "forecast"]


@dataclass(frozen=True)
class Job:
    """Who will train."""

    world: int = 1
    on_accelerator: bool = True
    trained_only: bool = False
    """The optimizer holds parameters that require grad alone."""

    @property
    def window(self) -> int | None:
        """Buckets that the ranks' communicator has in flight; None is all."""
        return NcclComm.window if self.on_accelerator and self.world > 1 else None

    @property
    def pieces(self) -> int:
        """That arrive of a shard."""
        return 1 if self.on_accelerator else self.world


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
    groups = _groups(settings, model, trained_only=job.trained_only)
    numbered = enumerate(group["params"] for group in groups)
    by_id = {id(parameter): index for index, params in numbered for parameter in params}
    wires = precision.wires(model)
    members, plan = plan_of(
        settings, model, by_id, wires, _Unplaced, world=job.world, window=job.window
    )
    every = settings.reduces_every_micro_batch(plan.reduces_every_micro_batch)
    passes = micro_batches if every else 1
    buckets = _Buckets(settings, precision, job, members, plan, groups, micro_batches > passes)
    rows = buckets.rows()
    gathered = _Gathered.of(settings, plan, rows)
    planned = {id(member.tensor) for member in members}
    loose = [p for p in model.parameters() if id(p) not in planned]
    found = [piece for shape, places in rows for piece in pieces(shape, places)]
    found += [*shared_pieces(rows), *_lanes(plan, job), gathered.room]
    found += [Piece(Kind.UNPLANNED, t.nbytes) for t in (*loose, *model.buffers())]
    part = _Part(job.world)
    sent = {
        "gradients": passes * sum(_reduced(spec, rows, part) for spec in plan.buckets),
        "parameters": sum(_published(spec, rows, part) for spec in plan.buckets)
        + part.of(micro_batches * gathered.brought),
    }
    traffic = _copied(rows, passes, micro_batches * gathered.times)
    return Forecast(settings, plan, found, sent, *traffic)


def _groups(
    settings: Config, model: nn.Module, *, trained_only: bool
) -> Sequence[Mapping[str, Any]]:
    """The groups of the configuration's optimizer, or one of what requires grad."""
    chosen = settings.optimizer
    every = chosen is not None and not trained_only
    params = [p for p in model.parameters() if every or p.requires_grad]
    if chosen is None:
        return [{"params": params}]
    try:
        return optim.build(chosen.type, params, chosen.params, model).param_groups
    except ConfigError:  # most have one group anyway, and some will not have it without memory
        return [{"params": params}]


@dataclass(frozen=True)
class _Part:
    """What a rank sends of a bucket, to reduce it or to gather it."""

    world: int

    def of(self, nbytes: float) -> int:
        """(N-1)/N."""
        return int(nbytes * (self.world - 1) / self.world)


Row = tuple[Shape, Places]


@dataclass(frozen=True)
class _Buckets:
    """The plan's buckets in elements, on the rank that has most."""

    settings: Config
    precision: Precision
    job: Job
    members: Sequence[PlannedParameter]
    plan: _core.Plan
    groups: Sequence[Mapping[str, Any]]
    """The optimizer's."""
    adds_up: bool
    """Micro-batches wait for others."""

    def rows(self) -> list[Row]:
        """By the bucket's number."""
        active = [self._active(spec) for spec in self.plan.buckets]
        totals = [sum(ranks) for ranks in zip(*active, strict=True)]
        fullest = totals.index(max(totals)) if totals else 0
        state, shards = self.settings.offloads
        away = self.job.on_accelerator
        homes = Homes.chosen(self.plan.buckets, state.ratio) if away and state.on_host else ()
        return [
            (
                self._shape(spec, ranks[fullest]),
                Places(
                    spec.id in homes,
                    away and shards.on_host and spec.sharded,
                    state.pin_memory,
                    shards.pin_memory,
                ),
            )
            for spec, ranks in zip(self.plan.buckets, active, strict=True)
        ]

    def _shape(self, spec: _core.Bucket, active: int) -> Shape:
        dtypes = Dtypes.of(self.members[spec.params[0]].tensor.dtype, self.precision)
        # Muon has the matrices among its groups, and another optimizer the rest
        matrices = spec.group is None or self.groups[spec.group].get("use_muon", True)
        return Shape(
            dtypes,
            spec.numel,
            self._owned(spec),
            spec.shard_numel,
            trained=spec.group is not None,
            sharded=spec.sharded,
            sums_locally=self.adds_up,
            state_bytes=state_bytes(self.settings, dtypes.state, active, matrices=matrices),
        )

    def _owned(self, spec: _core.Bucket) -> int:
        return spec.shard_numel if self.plan.shards_optimizer else spec.numel

    def _active(self, spec: _core.Bucket) -> list[int]:
        """Elements that an optimizer steps, by rank; those behind a parameter are its own."""
        owned, world = self._owned(spec), self.plan.world
        starts = [rank * spec.shard_numel * self.plan.shards_optimizer for rank in range(world)]
        trains = [self.members[param].tensor.requires_grad for param in spec.params]
        if spec.group is None or not any(trains):
            return [0] * world
        if all(trains):
            return [owned] * world
        ends = [*spec.offsets[1:], spec.numel]
        spans = [(lo, hi) for lo, hi, on in zip(spec.offsets, ends, trains, strict=True) if on]
        return [
            sum(max(0, min(hi, start + owned) - max(lo, start)) for lo, hi in spans)
            for start in starts
        ]


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


def _lanes(plan: _core.Plan, job: Job) -> Iterator[Piece]:
    """Memory of buckets in flight: the n-th launch uses lane n modulo the window."""
    order = [bucket for kind, bucket in plan.schedule if kind == "launch"]
    for position in range(plan.window):
        users = [plan.buckets[bucket] for bucket in order[position :: plan.window]]
        shards = [_wire(spec).shard_bytes(spec.shard_numel) for spec in users]
        if shards:
            yield Piece(Kind.ON_THEIR_WAY, plan.world * max(shards))
        if shards and job.pieces > 1:
            yield Piece(Kind.ON_THEIR_WAY, job.pieces * max(shards))


def _wire(spec: _core.Bucket) -> WireFormat:
    return format_of(spec.wire)


def _reduced(spec: _core.Bucket, rows: Sequence[Row], part: _Part) -> int:
    """Sent once for a bucket's gradient."""
    wire, sums = _wire(spec), rows[spec.id][0].dtypes.sums
    encoded = part.world * wire.shard_bytes(spec.shard_numel)
    rounds = wire.dtype is not None and wire.dtype.itemsize < sums.itemsize
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
