"""The plan's buckets in elements, and what of them is a rank's own.

Every rank holds as much of a bucket. Ranks differ in what their optimizer keeps: its owner alone of
a parameter that is updated whole, and nobody of one that is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zerort import _core
from zerort.config import Config
from zerort.forecast.job import Job
from zerort.forecast.updates import Updates
from zerort.memory import Dtypes, Homes, Kind, Piece, Places, PlannedParameter, Shape
from zerort.step.precision import Precision

__all__ = ["Buckets", "Row"]

Row = tuple[Shape, Places]
"""A bucket, and where it is. Of one whose parameters are exchanged a shard holds no masters."""


@dataclass(frozen=True)
class Even(Sequence[int]):
    """The same for each of many ranks, in the memory of one."""

    value: int
    ranks: int

    def __len__(self) -> int:
        return self.ranks

    def __getitem__(self, rank: Any) -> Any:
        if not 0 <= rank < self.ranks:
            raise IndexError(rank)
        return self.value


@dataclass(frozen=True)
class Own:
    """Bytes that are a rank's own, by the bucket's number and by rank."""

    states: Sequence[Sequence[int]]
    """Of the optimizer."""
    rooms: Sequence[Sequence[int]]
    """Masters of parameters that are exchanged, whole on their owners."""

    @property
    def by_rank(self) -> list[int]:
        """Of all buckets."""
        rows = [*self.states, *self.rooms]
        alike = sum(row.value for row in rows if isinstance(row, Even))
        uneven = [row for row in rows if not isinstance(row, Even)]
        if not uneven:
            return [alike] * (len(rows[0]) if rows else 0)
        return [alike + sum(own) for own in zip(*uneven, strict=True)]

    def pieces(self, rank: int, rows: Sequence[Row]) -> Iterator[Piece]:
        """Of one rank; `rows` says where."""
        for (_, places), kept, room in zip(rows, self.states, self.rooms, strict=True):
            yield Piece(Kind.STATE, kept[rank], places.state)
            yield Piece(Kind.MASTERS, room[rank], places.state)


@dataclass(frozen=True)
class Buckets:
    """Of one model under one configuration."""

    settings: Config
    precision: Precision
    job: Job
    members: Sequence[PlannedParameter]
    plan: _core.Plan
    updates: Updates
    adds_up: bool
    """Micro-batches wait for others."""

    def rows(self) -> list[Row]:
        """By the bucket's number, without what is a rank's own."""
        state, shards = self.settings.offloads
        away = self.job.on_accelerator
        homes = Homes.chosen(self.plan.buckets, state.ratio) if away and state.on_host else ()
        return [
            (
                self._shape(spec),
                Places(
                    spec.id in homes,
                    away and shards.on_host and spec.sharded,
                    state.pin_memory,
                    shards.pin_memory,
                ),
            )
            for spec in self.plan.buckets
        ]

    def own(self) -> Own:
        """What ranks differ in."""
        whole = self.updates.whole
        states = [
            self._kept_of_whole(spec) if spec.group in whole else self._kept(spec)
            for spec in self.plan.buckets
        ]
        return Own(states, [self._room(spec) for spec in self.plan.buckets])

    def _room(self, spec: _core.Bucket) -> Sequence[int]:
        if spec.way != "exchanged":
            return Even(0, self.plan.world)
        found, item = [0] * self.plan.world, self._dtypes(spec).master.itemsize
        for param, numel in zip(spec.params, spec.numels, strict=True):
            owner = self.plan.owner(param)
            assert owner is not None
            found[owner] += numel * item
        return found

    def _shape(self, spec: _core.Bucket) -> Shape:
        return Shape(
            self._dtypes(spec),
            spec.numel,
            0 if spec.way == "exchanged" else self._owned(spec),
            spec.shard_numel,
            trained=spec.group is not None,
            sharded=spec.sharded,
            sums_locally=self.adds_up,
        )

    def _dtypes(self, spec: _core.Bucket) -> Dtypes:
        return Dtypes.of(self.members[spec.params[0]].tensor.dtype, self.precision)

    def _owned(self, spec: _core.Bucket) -> int:
        return spec.shard_numel if self.plan.shards_optimizer else spec.numel

    def _kept(self, spec: _core.Bucket) -> Sequence[int]:
        if spec.group is None:
            return Even(0, self.plan.world)
        group, dtype = spec.group, self._dtypes(spec).state
        active = self._active(spec)
        if isinstance(active, Even):
            return Even(self.updates.kept(group, dtype, active.value), active.ranks)
        kept = {numel: self.updates.kept(group, dtype, numel) for numel in set(active)}
        return [kept[numel] for numel in active]

    def _kept_of_whole(self, spec: _core.Bucket) -> list[int]:
        """Where no rank owns a parameter alone, all do."""
        world, dtype = self.plan.world, self._dtypes(spec).state
        found, shared = [0] * world, 0
        for param in spec.params:
            if not self.members[param].tensor.requires_grad:
                continue
            kept = self.updates.kept_of_whole(dtype, self.members[param].form.shape)
            owner = self.plan.owner(param)
            if owner is None:
                shared += kept
            else:
                found[owner] += kept
        return [own + shared for own in found]

    def _active(self, spec: _core.Bucket) -> Sequence[int]:
        """Elements that an optimizer steps, by rank; those behind a parameter are its own."""
        owned, world = self._owned(spec), self.plan.world
        trains = [self.members[param].tensor.requires_grad for param in spec.params]
        if all(trains):
            return Even(owned, world)
        ends = [*spec.offsets[1:], spec.numel]
        spans = [(lo, hi) for lo, hi, on in zip(spec.offsets, ends, trains, strict=True) if on]
        if not self.plan.shards_optimizer:
            return Even(sum(hi - lo for lo, hi in spans), world)
        return _cut(spans, owned, world)


def _cut(spans: Sequence[tuple[int, int]], length: int, world: int) -> list[int]:
    """How much of the ascending `spans` lies in each of `world` pieces of a length."""
    found = [0] * world
    for lo, hi in spans:
        for piece in range(lo // length, -(-hi // length)):
            found[piece] += min(hi, (piece + 1) * length) - max(lo, piece * length)
    return found
