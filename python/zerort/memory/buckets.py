"""Buckets' memory on this rank.

What this guarantees: the module's parameters are views of their buckets' values for as long as the
engine lives. What it does not do: no communication, no knowledge of steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zerort import _core
from zerort.device import LINE, Mark, device_for
from zerort.memory.away import AwayMaster
from zerort.memory.fingerprint import first_of, line_prints
from zerort.memory.flat import Memory, Side
from zerort.memory.homes import Homes
from zerort.memory.masters import DeviceMaster, HostMaster, Master, OwnMaster, SameMaster
from zerort.memory.moved import Carrier
from zerort.memory.origins import Origin
from zerort.memory.parameters import PlannedParameter
from zerort.memory.secondary import Secondary
from zerort.memory.sizes import Dtypes
from zerort.memory.sums import HostSums, Sums, SumsHere
from zerort.memory.values import Freeable, Resident

__all__ = ["FlatBucket", "HeldBucket", "Layout"]


@dataclass(frozen=True)
class Layout:
    """What decides where memory lies and how much of it there is."""

    plan: _core.Plan
    rank: int
    sums: torch.dtype = torch.float32
    """What gradients of less than fp32 are added up in."""
    local_sums: bool = False
    """Micro-batches are added up on this rank before they are reduced."""
    low_masters: bool = False
    """Parameters of less than fp32 are their own masters."""
    wide_states: bool = False
    """What the optimizer keeps beside them is fp32 all the same."""
    keeps_secondary: bool = False
    """What a gather between hosts has brought of sharded parameters is kept."""
    homes: Homes = field(default_factory=Homes)


class HeldBucket:
    """One bucket's parameters on this rank.

    `values` holds them in their own dtype: whole for good, or, where the plan shards parameters,
    only between `bring` and `free`. `owned` is the part of them that this rank keeps: its shard, or
    the whole where nothing is sharded. It is a part of `values`, or, where they are sharded, memory
    of its own, which may be the host's. `master` is what a checkpoint holds of it: `owned` itself,
    where no optimizer knows more. `is_common` says that all ranks take the same values, so that
    none have to be sent. `revision` counts how often what this rank keeps has been replaced, or has
    gone elsewhere; `secondary` is what it keeps of its host's part of sharded values, beside that.
    """

    __slots__ = (
        "_crossing",
        "_host",
        "_keeps_secondary",
        "_lines",
        "_origins",
        "forms",
        "has_parted",
        "is_common",
        "master",
        "names",
        "owned",
        "params",
        "revision",
        "secondary",
        "spec",
        "start",
        "values",
    )

    def __init__(
        self, layout: Layout, spec: _core.Bucket, members: Sequence[PlannedParameter]
    ) -> None:
        plan, rank = layout.plan, layout.rank
        dtype, device = members[0].tensor.dtype, members[0].tensor.device
        self.spec = spec
        self.names = [member.name for member in members]
        self.params = [member.tensor for member in members]
        self.forms = [member.form for member in members]
        whole = not plan.shards_optimizer
        self.start = 0 if whole else rank * spec.shard_numel
        self._host = layout.homes.shard_host_of(spec)
        self._crossing: Mark | None = None
        self._lines: Tensor | None = None
        self.has_parted = False
        """Who has the parameters now has this rank's part of them too."""
        self.revision = 0
        self.secondary: Secondary | None = None
        self._keeps_secondary = layout.keeps_secondary
        self.values: Resident | Freeable
        if spec.sharded:
            first, last = self.names[0], self.names[-1]
            contents = first if first == last else f"{first} .. {last}"
            self.values = Freeable(spec, self.forms, dtype, device, contents)
            self.owned = Memory.zeros(0, dtype, device)
        else:
            self.values = Resident(plan, spec, self.forms, dtype, device)
            self.owned = self.values.memory if whole else self.values.shard(rank)
        self.master = self.owned.tensor
        self._origins: Sequence[Origin] = [member.origin for member in members]
        self.is_common = all(origin.is_common for origin in self._origins)
        if not spec.sharded and not any(origin.is_common for origin in self._origins):
            self.adopt()  # so that a parameter's own memory goes before the next bucket's comes

    @property
    def shard_on_host(self) -> bool:
        """Whether what this rank keeps is the host's memory, beside a device."""
        return self._host is not None

    @property
    def is_adopted(self) -> bool:
        """Whether the parameters' values have been taken over."""
        return not self._origins

    @property
    def is_sharded(self) -> bool:
        """Whether the values are in this memory, and only in shards now."""
        here = self.is_adopted and not self.has_parted
        return self.spec.sharded and here and not self.values.is_whole

    def adopt(self) -> None:
        """Takes the parameters' values from where they are, once, and makes the parameters views of
        this memory, which is whole then; `keep` and `free` follow.

        What can be taken without other ranks has been, when the bucket was made, unless it is
        sharded.
        """
        self.values.bring()
        self.values.land()
        with torch.no_grad():
            for origin, parameter, view in zip(
                self._origins, self.params, self.values.views(), strict=True
            ):
                origin.fill(view)
                parameter.data = view
        self._origins = ()

    def bring(self) -> None:
        """Memory for the parameters' values, where they are sharded, with this rank's slice in it;
        the others are for an all-gather.
        """
        if isinstance(self.values, Freeable):
            self.values.bring()
            with torch.no_grad():
                self._send()

    def keep_secondary(self, start: int, numel: int) -> Secondary | None:
        """Takes memory for `numel` elements from `start` on, of sharded values, where such are to
        be kept.
        """
        if self._keeps_secondary and self.spec.sharded:
            self.secondary = Secondary(self.values, start, numel)
        return self.secondary

    def first_change(self) -> int | Tensor | None:
        """The first `LINE` of this rank's part in which sharded values, whole as they are, are not
        what it keeps of them; `owner_of` names the parameter.
        """
        if self._lines is not None:
            return first_of(line_prints(self._slice(), LINE) != self._lines)
        own = self.owned.tensor
        return device_for(own.device).first_difference(self._slice(), own)

    def owner_of(self, line: int) -> str | None:
        """The parameter that has a line of this rank's part; None behind the last."""
        own = self.owned.tensor
        if line >= own.nbytes // LINE:
            return None
        element = self.start + line * LINE // own.itemsize
        return self.names[bisect_right(self.spec.offsets, element) - 1]

    def keep(self) -> None:
        """The values are what counts: this rank's slice goes into `owned` where that is memory of
        its own.
        """
        if isinstance(self.values, Freeable):
            self._make_room()
            with torch.no_grad():
                self._receive()

    def _make_room(self) -> None:
        """Memory for this rank's part: not before it is needed, for until then the values are
        somewhere else.
        """
        if not self.owned.tensor.numel():
            own, numel = self.owned.tensor, self.spec.shard_numel
            if self._host is None:
                self.owned = Memory.zeros(numel, own.dtype, own.device)
            else:
                self.owned = Memory.of(self._host.zeros(numel, own.dtype))
            self.master = self.owned.tensor

    def _send(self) -> None:
        """This rank's part into its place among the values."""
        if self._host is None:
            self._slice().copy_(self.owned.tensor)
            return
        self._crossing = self._host.send(self._slice(), self.owned.tensor)
        self._lines = line_prints(self._slice(), LINE)

    def _receive(self) -> None:
        """The other way; the host waits where it is its memory."""
        self.revision += 1
        if self._host is None:
            self.owned.tensor.copy_(self._slice())
            return
        self._host.receive(self.owned.tensor, self._slice()).wait()
        self._crossing = None
        self._lines = line_prints(self._slice(), LINE)

    def ready(self) -> None:
        """The host may write what it has of this bucket."""
        if self._crossing is not None:
            self._crossing.wait()
            self._crossing = None

    def take_part(self) -> None:
        """The values have been written, while they were whole: this rank's slice of them is what
        counts.
        """
        if isinstance(self.values, Freeable):
            with torch.no_grad():
                self._receive()
                self.take_writes()

    def free(self) -> None:
        """Gives the memory of sharded parameters' values back."""
        if isinstance(self.values, Freeable):
            self.values.free(self.params)
            self._lines = None

    @property
    def is_aliased(self) -> bool:
        """Whether anything but the parameters may have views of sharded values that are whole."""
        return isinstance(self.values, Freeable) and self.values.is_aliased

    def part_with_aliases(self) -> None:
        """What has views of the values keeps that memory."""
        assert isinstance(self.values, Freeable)
        self.values.leave(self.params)

    def part_with_shard(self) -> Tensor:
        """What this rank keeps of sharded values (shard_numel,), for who has the parameters from
        now on. They are views of memory that is given back.
        """
        self.ready()
        self.has_parted = True
        shard = self.owned.tensor
        if self.master is shard:
            self.owned = Memory.zeros(0, shard.dtype, shard.device)
            self.master = self.owned.tensor
        if self.values.is_whole:
            self.part_with_aliases()
        return shard

    def move_values(self, carry: Carrier) -> None:
        """What lies on the device of the parameters, elsewhere, and parameters that are whole with
        it. Nothing is under way, and nothing sharded is whole.
        """
        self.revision += 1
        if self.secondary is not None:
            self.secondary.release()
        if isinstance(self.values, Resident):
            self.values.move(carry)
            for parameter, view in zip(self.params, self.values.views(), strict=True):
                parameter.data = view
        elif self._host is None:
            self.owned.move(carry)
        self.master = self.owned.tensor

    @property
    def length(self) -> int:
        """Of what this rank keeps, in elements."""
        return self.owned.tensor.numel()

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces what this rank keeps, (n,) from `start` of the owned part on."""
        self.ready()
        self.revision += 1
        self.owned.tensor.narrow(0, start, values.numel()).copy_(values)

    def write_back(self) -> None:
        """The parameters that this rank owns follow `master`."""

    def take_writes(self) -> None:
        """`master` follows what has been written into the parameters that this rank owns."""

    def _slice(self) -> Tensor:
        assert isinstance(self.values, Freeable)
        return self.values.part(self.start, self.spec.shard_numel)


class FlatBucket(HeldBucket):
    """One bucket's memory on this rank, where an optimizer has its parameters.

    `group` is the optimizer's. `owned` is what this rank keeps the optimizer's state of, and
    `master` the optimizer's copy of it in fp32, the same memory where the parameters are fp32
    themselves and in the same place, or are to do without; where parameters are exchanged it has no
    elements, and `away` stands for what a room has. `state_dtype` is what the optimizer
    computes and keeps its state in, which may be wider than the masters. `sums` holds the reduced
    gradient of `owned`. `local` is this rank's own gradient of the whole bucket, summed over
    micro-batches, where that is the rule and takes a wider dtype than the parameters' (`widens`).
    It has been sent when the reduced one arrives, so where that is on the device too it is a part
    of the same memory.
    """

    __slots__ = ("_masters", "group", "local", "squares", "state_dtype", "sums", "widens")

    is_published = True

    def __init__(
        self, layout: Layout, spec: _core.Bucket, members: Sequence[PlannedParameter]
    ) -> None:
        super().__init__(layout, spec, members)
        assert spec.group is not None
        self.group = spec.group
        self._make_room()
        dtype, device = members[0].tensor.dtype, members[0].tensor.device
        kinds = Dtypes.of(dtype, layout)
        self._masters = self._master_in(kinds.master, layout.homes, device)
        self.master = self._masters.tensor
        self.state_dtype, self.widens = kinds.state, kinds.widens
        local = layout.local_sums and self.widens
        self.sums, self.local = self._sums_in(kinds.sums, layout, device, local=local)
        self.squares: float | Tensor = 0.0

    def _master_in(self, precise: torch.dtype, homes: Homes, device: torch.device) -> Master:
        if self.spec.way == "exchanged":
            return AwayMaster(self.owned, precise, watches=not self.spec.sharded)
        room = homes.room_of(self.spec)
        if room is not None and self._host is None:
            return HostMaster(self.owned, precise, room)
        if room is None and self._host is not None:
            return DeviceMaster(self.owned, precise, self._host, device)
        same = self.owned.tensor.dtype == precise
        return SameMaster(self.owned) if same else OwnMaster(self.owned, precise)

    def _sums_in(
        self, dtype: torch.dtype, layout: Layout, device: torch.device, *, local: bool
    ) -> tuple[Sums, Memory | None]:
        plan, spec = layout.plan, self.spec
        room, whole = layout.homes.room_of(spec), not plan.shards_optimizer
        everything = Memory.of_bucket(plan, spec, dtype, device) if whole or local else None
        if room is not None:
            return HostSums(room, spec.shard_numel, dtype), everything
        if everything is None:
            shard = Memory.zeros(spec.shard_numel, dtype, device)
            return SumsHere(shard, shard), None
        shard = everything.shard(layout.rank)
        return SumsHere(everything if whole else shard, shard), everything if local else None

    @property
    def accum(self) -> Memory:
        """The reduced gradient of `owned`."""
        return self.sums.whole

    @property
    def gradient(self) -> Tensor:
        """Its elements (length,)."""
        return self.accum.tensor

    @property
    def away(self) -> AwayMaster | None:
        """What stands for the masters, where the owners of exchanged parameters have them."""
        return self._masters if isinstance(self._masters, AwayMaster) else None

    @property
    def summed(self) -> Side:
        """The reduced gradient of `owned`, where it is at home."""
        return Side(self.accum.tensor, self.sums.host if isinstance(self.sums, HostSums) else None)

    @property
    def part(self) -> Side:
        """What this rank keeps of the parameters, where it is at home."""
        return Side(self.owned.tensor, self._host)

    @property
    def noted(self) -> Side:
        """The same as `note_writes` has found it; what there is where nothing was noted."""
        away = self.away
        return self.part if away is None or away.noted is None else Side(away.noted, self._host)

    def arrive(self, start: int, values: Tensor) -> None:
        """Some of this rank's part, (n,) from `start` on, has come from the owners."""
        super().assign(start, values)
        if self.away is not None:
            self.away.arrived(start, values)

    @property
    def reduced_shard(self) -> Memory:
        """The part of it that this rank sums."""
        return self.sums.shard

    @property
    def is_on_host(self) -> bool:
        """Whether masters, sums and the optimizer's state are on the host, beside a device."""
        return isinstance(self.sums, HostSums)

    @property
    def has_master(self) -> bool:
        """Whether the optimizer's copy is memory of its own."""
        return self._masters.is_own

    def keep(self) -> None:
        """And the masters follow."""
        super().keep()
        self._masters.follow()

    def move_values(self, carry: Carrier) -> None:
        """And the masters, where they are the same memory."""
        super().move_values(carry)
        self._masters.parted()
        self.master = self._masters.tensor

    def move_masters(self, carry: Carrier) -> None:
        """Masters that are memory of their own on the device, elsewhere."""
        if self._host is None or not self.is_on_host:
            self._masters.move(carry)
            self.master = self._masters.tensor

    def move_sums(self, carry: Carrier) -> None:
        """Sums on the device, elsewhere: those over micro-batches are the same memory."""
        if self.local is None:
            self.sums.move(carry)
        else:
            self.local.move(carry)

    def write_back(self) -> None:
        """Casts the updated masters into the parameters this rank owns."""
        super().ready()
        self.revision += 1
        self._crossing = self._masters.lead()

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces masters, (n,) from `start` of the owned part on, and the parameters with them,
        as far as this rank owns them.
        """
        super().ready()
        self.revision += 1
        self._masters.assign(min(start, self.master.numel()), values)

    def ready(self) -> None:
        """And of its masters."""
        super().ready()
        self._masters.ready()

    @property
    def doubt(self) -> Tensor | None:
        """A scalar on the device, not 0 where parameters have been written since the masters were
        last brought to them; None where `take_writes` finds out for nothing.
        """
        return None if self.spec.sharded else self._masters.doubt()

    @property
    def finds_writes(self) -> bool:
        """Whether `take_writes` finds what nobody has told of; where shards and masters are in two
        places, it is called by who writes.
        """
        if isinstance(self._masters, AwayMaster):
            return False
        return not (self.spec.sharded and isinstance(self._masters, HostMaster | DeviceMaster))

    def take_writes(self) -> None:
        """Brings to the masters what something outside a step has written into the parameters this
        rank owns, such as load_state_dict or a clamp through `.data`.
        """
        super().ready()
        self._masters.take_writes()

    def note_writes(self) -> None:
        """What stands in the parameters is not for the masters, although it is not their cast: a
        feature has written it. It is what later writes are found by, until the next step.
        """
        self._masters.note_writes()

    def slots(self, send: Tensor) -> list[Tensor]:
        """Views of a send buffer (numel,), one per parameter, in the layout of its gradient.

        Each has a version counter of its own (that is what `.data` is for), which shows when
        autograd has added to it.
        """
        pieces = zip(self.spec.offsets, self.spec.numels, self.forms, strict=True)
        return [form.over(send.narrow(0, start, length)).data for start, length, form in pieces]
