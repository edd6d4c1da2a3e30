"""The collectives of a bucket in bytes: what a rank sends in each, and the memory that it is sent
from.

Groups are those of the mesh, by their sizes alone. What it guarantees: legs are cut as
`transport_of` cuts them, and lanes hold what `lane_for` takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from zerort import _core
from zerort.config import Config
from zerort.errors import ConfigError
from zerort.forecast.job import Job
from zerort.grads.sources import PIECE
from zerort.memory import Dtypes, Kind, Piece
from zerort.mesh import Seat, arrange
from zerort.mesh.shared import gathers_bytes, scatters_bytes
from zerort.start.connect import hierarchy_of
from zerort.start.planning import Sizes
from zerort.wire import Dense, WireFormat, format_of

__all__ = ["Leg", "Seating", "gather_pieces", "lane_pieces", "legs_of", "reduced"]


@dataclass(frozen=True)
class Seating:
    """How a job's ranks sit: copies of the model state, of each the hosts that count, of each so
    many ranks.
    """

    copies: int
    hosts: int
    ranks: int
    keeps: bool
    """Each host keeps what has come of sharded parameters, until they change."""
    shares: frozenset[str]
    """Groups whose ranks send through memory that they share."""

    @classmethod
    def of(cls, settings: Config, job: Job) -> Seating:
        """By a configuration. Raises `ConfigError` for numbers that do not divide the ranks."""
        if job.world % job.hosts:
            raise ConfigError(
                f"--hosts {job.hosts}: the {job.world} ranks are not equally many on each: give a "
                "number that divides them"
            )
        each = job.world // job.hosts
        seats = [Seat(f"host {rank // each}", "", "", 0) for rank in range(job.world)]
        found = arrange(seats, hierarchy_of(settings, on_host=not job.on_accelerator))
        hosts, ranks = found.hosts, len(found.copies[0][0])
        if 1 in (hosts, ranks):
            hosts, ranks = 1, hosts * ranks
        keeps = hosts > 1 and settings.zero_optimization.secondary_size == ranks
        near = {"inner"} | ({"shard"} if hosts * ranks <= each else set())
        near |= {"shard", "outer", "replica"} if job.hosts == 1 else set()
        shares = frozenset(near if job.shares(settings) else ())
        return cls(len(found.copies), hosts, ranks, keeps, shares)

    @property
    def nested(self) -> bool:
        """Whether there are hops between hosts or copies."""
        return self.hosts > 1 or self.copies > 1

    @property
    def sizes(self) -> Sizes:
        """For the plan."""
        return Sizes(self.copies * self.hosts * self.ranks, self.hosts, self.copies)

    def members(self, group: str) -> int:
        """Ranks of a group of the mesh."""
        shards = self.hosts * self.ranks
        of = {"inner": self.ranks, "outer": self.hosts, "replica": self.copies, "shard": shards}
        return of[group]

    def gathered(self, hops: Sequence[_core.Hop], nbytes: int) -> Counter[str]:
        """Bytes that a rank sends where `nbytes` come together, by group."""
        sent: Counter[str] = Counter()
        for hop in reversed(hops):  # the last one fills all of it
            members = self.members(hop.group)
            nbytes //= members
            sent[hop.group] += (members - 1) * nbytes
        return sent


@dataclass(frozen=True)
class Leg:
    """One reduction of a bucket's gradient: `numel` elements in `members` pieces."""

    group: str
    numel: int
    members: int
    wire: WireFormat
    full: torch.dtype
    """What a bucket's gradients are summed in where nothing is to be lost."""

    @property
    def piece(self) -> int:
        """Bytes."""
        return self.wire.shard_bytes(self.numel // self.members)

    def gathered(self, sums: torch.dtype) -> int:
        """Bytes of a piece whose sums are gathered, which are kept in `sums`."""
        return min(self.piece, self.numel // self.members * sums.itemsize)


def legs_of(spec: _core.Bucket, dtypes: Dtypes, seating: Seating) -> list[Leg]:
    """A bucket's, in their order."""
    legs: list[Leg] = []
    numel, full = spec.numel, torch.promote_types(dtypes.values, torch.float32)
    for hop in spec.reduce_hops:
        if hop.op == "all_gather":
            continue
        members = seating.members(hop.group)
        if hop.op == "all_reduce":
            numel = -(-numel // (members * PIECE)) * members * PIECE
        wire = Dense(full) if hop.wire is None else format_of(hop.wire)
        legs.append(Leg(hop.group, numel, members, wire, full))
        numel //= members
    return legs


def reduced(spec: _core.Bucket, legs: Sequence[Leg], sums: torch.dtype) -> Counter[str]:
    """Bytes that a rank sends to reduce a bucket's gradient, by group."""
    by_group = {leg.group: leg for leg in legs}
    sent: Counter[str] = Counter()
    for hop in spec.reduce_hops:
        leg = by_group[hop.group]
        if hop.op != "all_gather":
            sent[hop.group] += (leg.members - 1) * leg.piece
        if hop.op != "reduce_scatter":
            of = leg.full if hop.op == "all_reduce" else sums
            sent[hop.group] += (leg.members - 1) * leg.gathered(of)
    return sent


def lane_pieces(
    plan: _core.Plan, legs: Sequence[Sequence[Leg]], job: Job, seating: Seating
) -> Iterator[Piece]:
    """Memory of buckets in flight, whose `legs` are by the bucket's number: the n-th launch uses
    lane n modulo the window.
    """
    order = [bucket for kind, bucket in plan.schedule if kind == "launch"]
    for position in range(plan.window):
        users = [legs[bucket] for bucket in order[position :: plan.window]]
        for number, each in enumerate(zip(*users, strict=True)):
            yield from _leg_pieces(each, job, seating)
            if number > 0:  # what the leg before has summed
                yield Piece(Kind.ON_THEIR_WAY, max(map(_full_bytes, each)))
        if users and users[0] and users[0][-1].group == "replica":
            yield Piece(Kind.ON_THEIR_WAY, max(_full_bytes(each[-1]) for each in users))


def _leg_pieces(legs: Sequence[Leg], job: Job, seating: Seating) -> Iterator[Piece]:
    """Of one leg of a lane's buckets: what leaves, and what arrives beside it."""
    leaving = max(leg.members * leg.piece for leg in legs)
    if legs[0].group in seating.shares and legs[0].members > 1:
        yield Piece(Kind.ON_THEIR_WAY, scatters_bytes(leaving))
        return
    yield Piece(Kind.ON_THEIR_WAY, leaving)
    arriving = [leg.members * leg.piece for leg in legs if job.exchanges(adds=leg.wire.adds)]
    if arriving and legs[0].members > 1:
        yield Piece(Kind.ON_THEIR_WAY, max(arriving))


def gather_pieces(
    ways: Sequence[tuple[Sequence[_core.Hop], int]], seating: Seating
) -> Iterator[Piece]:
    """Memory that ranks share for all-gathers, by the hops of each and the bytes that come together
    in them.
    """
    sizes: dict[str, list[int]] = {}
    for hops, whole in ways:
        nbytes = whole
        for hop in reversed(hops):
            nbytes //= seating.members(hop.group)
            sizes.setdefault(hop.group, []).append(nbytes)
    for group, each in sizes.items():
        if group in seating.shares:
            yield Piece(Kind.ON_THEIR_WAY, gathers_bytes(each))


def _full_bytes(leg: Leg) -> int:
    return leg.numel * leg.full.itemsize
