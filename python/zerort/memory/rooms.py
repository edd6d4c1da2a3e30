"""Where exchanged parameters lie whole: in a *room* on their owner, with master, gradient, state.

A bucket whose parameters are exchanged is cut evenly, and what steps them is elsewhere: each rank
owns some of them, which lie in its room one behind the other. So a model has two layouts. The
plan's says where gradients are summed and values kept; that of `kept` where masters and the
optimizer's state lie, under the same numbers of buckets: all rooms of a bucket, one behind the
other, each as long as the longest. It is what a checkpoint is written by.

What it guarantees: a room takes as much memory as what its rank owns. What it does not do: it sends
nothing; the ways between shards and rooms are the core's, and `run/exchange.py` walks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from zerort import _core
from zerort.memory.buckets import FlatBucket
from zerort.memory.flat import Side
from zerort.memory.forms import Form
from zerort.memory.held import Layout
from zerort.memory.moved import Carrier
from zerort.memory.parameters import PlannedParameter
from zerort.memory.sizes import Dtypes

__all__ = ["Kept", "Placed", "Room", "Stepped", "exchanged", "kept_layout", "rooms_of"]

_UNIT = 128
"""Elements that a shard is a multiple of."""


class Placed(Protocol):
    """Where parameters lie in shards, in elements: a bucket, as the core has planned it."""

    @property
    def id(self) -> int:
        """Its number."""

    @property
    def grain(self) -> _core._Grain:
        """What of its parameters no border cuts."""

    @property
    def params(self) -> list[int]:
        """Ids, in the order in which they lie."""

    @property
    def offsets(self) -> list[int]:
        """Where each starts."""

    @property
    def numels(self) -> list[int]:
        """Of each."""

    @property
    def numel(self) -> int:
        """Of all, padding included."""

    @property
    def shard_numel(self) -> int:
        """Of one rank's part."""


class Kept(Protocol):
    """What a checkpoint holds: this rank's part of a bucket, or its room."""

    names: list[str]
    params: list[nn.Parameter]
    forms: list[Form]

    @property
    def start(self) -> int:
        """The element of the bucket at which it begins."""

    master: Tensor

    @property
    def spec(self) -> Placed:
        """Of all ranks' parts."""

    @property
    def length(self) -> int:
        """Of this rank's part, in elements."""

    def ready(self) -> None:
        """The host may write the masters."""

    def write_back(self) -> None:
        """The masters have been updated."""

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces masters, (n,) from `start` of the part on."""


class Stepped(Kept, Protocol):
    """What an optimizer steps over: a part, or a room, that it has."""

    group: int
    state_dtype: torch.dtype

    @property
    def gradient(self) -> Tensor:
        """The reduced gradient of that part (length,), at the boundary."""

    @property
    def is_on_host(self) -> bool:
        """Whether masters and state are on the host, beside a device."""

    @property
    def is_published(self) -> bool:
        """Whether the parameters of that part are sent from where they are, once updated."""

    def move_masters(self, carry: Carrier) -> None:
        """Masters that are memory of their own on the device, elsewhere."""


@dataclass(frozen=True)
class Berths:
    """A bucket as its rooms lie one behind the other."""

    id: int
    params: list[int]
    offsets: list[int]
    numels: list[int]
    lengths: list[int]
    """Of the rooms, by rank."""
    shard_numel: int
    grain: _core._Grain = "whole"

    @property
    def numel(self) -> int:
        """Of all ranks."""
        return len(self.lengths) * self.shard_numel

    @classmethod
    def of(cls, spec: _core.Bucket, owners: Sequence[Sequence[tuple[int, int]]]) -> Berths:
        """`owners` says by rank what of the bucket it owns, and where in its room that starts."""
        numels = dict(zip(spec.params, spec.numels, strict=True))
        rows = [sorted(places, key=lambda at: (at[1], numels[at[0]])) for places in owners]
        bases = [row[0][1] if row else 0 for row in rows]
        lengths = [
            row[-1][1] + numels[row[-1][0]] - base if row else 0
            for row, base in zip(rows, bases, strict=True)
        ]
        longest = -(-max(*lengths, 1) // _UNIT) * _UNIT
        placed = [
            (param, rank * longest + start - bases[rank])
            for rank, row in enumerate(rows)
            for param, start in row
        ]
        params, offsets = [param for param, _ in placed], [start for _, start in placed]
        return cls(spec.id, params, offsets, [numels[param] for param in params], lengths, longest)


def exchanged(plan: _core.Plan) -> list[_core.Bucket]:
    """The buckets whose parameters come to their owners by an exchange."""
    return [bucket for bucket in plan.buckets if bucket.way == "exchanged"]


class Room:
    """This rank's own parameters of one exchanged bucket, whole.

    `master` (length,) is the optimizer's copy of them, and all there is of it on any rank. The
    gradient has memory only between `open` and `close`.
    """

    __slots__ = (
        "_basis",
        "_gradient",
        "_host",
        "_sums",
        "bucket",
        "forms",
        "group",
        "master",
        "names",
        "params",
        "spec",
        "start",
        "state_dtype",
    )

    is_published = False

    def __init__(self, layout: Layout, spec: Berths, bucket: FlatBucket) -> None:
        self.bucket, self.spec, self.group = bucket, spec, bucket.group
        position = {param: index for index, param in enumerate(bucket.spec.params)}
        order = [position[param] for param in spec.params]
        self.names = [bucket.names[index] for index in order]
        self.params = [bucket.params[index] for index in order]
        self.forms = [bucket.forms[index] for index in order]
        self.start = layout.rank * spec.shard_numel
        kinds = Dtypes.of(bucket.owned.tensor.dtype, layout)
        self.state_dtype, self._sums = kinds.state, kinds.sums
        home = layout.homes.room_of(bucket.spec)
        self._host = None if home is None else home.host
        length = spec.lengths[layout.rank]
        if self._host is not None:
            self.master = self._host.zeros(length, kinds.master)
        else:
            device = bucket.params[0].device
            self.master = torch.zeros(length, dtype=kinds.master, device=device)
        self._gradient: Tensor | None = None
        self._basis: Tensor | None = None

    @property
    def length(self) -> int:
        """Of what this rank owns, in elements."""
        return self.master.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.bucket.owned.tensor.dtype

    @property
    def is_on_host(self) -> bool:
        """Whether all of it is, beside a device."""
        return self._host is not None

    @property
    def gradient(self) -> Tensor:
        """The reduced gradient (length,), in the dtype of sums."""
        assert self._gradient is not None, "the room is not open"
        return self._gradient

    @property
    def kept(self) -> Side:
        """The masters, where they are at home."""
        return Side(self.master, self._host)

    @property
    def reduced(self) -> Side:
        """The gradient, there too."""
        return Side(self.gradient, self._host)

    def open(self) -> None:
        """Memory for the gradient, zeros between parameters."""
        if self._gradient is None:
            self._gradient = self._zeros(self._sums).tensor

    def close(self) -> None:
        """It is given back."""
        self._gradient = None

    def fresh(self) -> Side:
        """Memory for the parameters as they are (length,), for `follow` and `take_writes`."""
        return self._zeros(self.dtype)

    def _zeros(self, dtype: torch.dtype) -> Side:
        if self._host is not None:
            return Side(self._host.zeros(self.length, dtype), self._host)
        return Side(torch.zeros(self.length, dtype=dtype, device=self.master.device))

    def follow(self, values: Tensor) -> None:
        """The masters become the parameters as they are (length,)."""
        self.master.copy_(values)
        self.sent()

    def take_writes(self, values: Tensor, noted: Tensor | None) -> None:
        """The masters follow what has been written into the parameters, (length,) as they are now:
        elements that have other bits than in `noted`, or than what was sent last.
        """
        before = self._basis if noted is None else noted
        if before is None:
            before = self.master.to(values.dtype)
        bits = _BITS[values.itemsize]
        # a cast may give a NaN another payload than it has
        same = (values.view(bits) == before.view(bits)) | (values.isnan() & before.isnan())
        torch.where(same, self.master, values.to(self.master.dtype), out=self.master)

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces masters, (n,) from `start` on; the parameters follow when they are sent next."""
        if self._basis is None:
            self._basis = self.master.to(self.dtype, copy=True)
        start = min(start, self.length)  # of what another rank owns nothing lies here
        self.master.narrow(0, start, values.numel()).copy_(values)

    def sent(self, start: int = 0, end: int | None = None) -> None:
        """All ranks have the parameters that follow from the masters; or from those from `start` to
        `end` alone.
        """
        if end is None:
            self._basis = None
        elif self._basis is not None:
            part = slice(start, end)
            self._basis[part].copy_(self.master[part])

    def ready(self) -> None:
        """Nothing of it is under way between two exchanges."""

    def write_back(self) -> None:
        """It takes all ranks to bring the parameters back."""

    def move_masters(self, carry: Carrier) -> None:
        """The masters, elsewhere."""
        if self._host is None:
            self.master = carry(self.master)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def rooms_of(layout: Layout, buckets: Sequence[FlatBucket]) -> dict[int, Room]:
    """This rank's rooms, by the number of their bucket, of those `buckets` that are exchanged."""
    ways = {spec.id: spec for spec in exchanged(layout.plan)}
    if not ways:
        return {}
    berths = _berths(layout.plan)
    return {b.spec.id: Room(layout, berths[b.spec.id], b) for b in buckets if b.spec.id in ways}


def _berths(plan: _core.Plan) -> dict[int, Berths]:
    owned = [
        {param: start for exchange in plan.exchanges(rank) for param, start in exchange.places}
        for rank in range(plan.shards)
    ]
    found = {}
    for spec in exchanged(plan):
        params = spec.params
        owners = [[(param, at[param]) for param in params if param in at] for at in owned]
        found[spec.id] = Berths.of(spec, owners)
    return found


def kept_layout(
    plan: _core.Plan, planned: Sequence[PlannedParameter], rooms: dict[int, Room]
) -> _core.Plan:
    """Where masters and state lie: the plan's own layout where nothing is exchanged."""
    if not rooms:
        return plan
    specs: list[Placed] = [
        rooms[spec.id].spec if spec.id in rooms else spec for spec in plan.buckets
    ]
    return _core.Plan.restore(
        [member.spec() for member in planned],
        [(spec.params, spec.offsets, spec.numel) for spec in specs],
        world=plan.shards,
        stage=3 if plan.shards_parameter else 2 if plan.shards_gradient else 1,
    )
