"""A bucket's memory on this rank, where an optimizer has its parameters.

What this guarantees: masters follow what is written into the parameters, and lead after an update.
What it does not do: no communication, no knowledge of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zerort import _core
from zerort.memory.away import AwayMaster
from zerort.memory.flat import Memory, Side
from zerort.memory.held import HeldBucket, Layout
from zerort.memory.homes import Homes
from zerort.memory.masters import DeviceMaster, HostMaster, Master, OwnMaster, SameMaster
from zerort.memory.moved import Carrier
from zerort.memory.parameters import PlannedParameter
from zerort.memory.sizes import Dtypes
from zerort.memory.sums import HostSums, Sums, SumsHere

__all__ = ["FlatBucket"]


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
        if room is not None and self.own.host is None:
            return HostMaster(self.owned, precise, room)
        if room is None and self.own.host is not None:
            return DeviceMaster(self.owned, precise, self.own.host, device)
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
        return Side(self.owned.tensor, self.own.host)

    @property
    def noted(self) -> Side:
        """The same as `note_writes` has found it; what there is where nothing was noted."""
        away = self.away
        return self.part if away is None or away.noted is None else Side(away.noted, self.own.host)

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
        if self.own.host is None or not self.is_on_host:
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
        self.own.ready()
        self.own.replaced()
        self.own.leave(self._masters.lead())

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces masters, (n,) from `start` of the owned part on, and the parameters with them,
        as far as this rank owns them.
        """
        self.own.ready()
        self.own.replaced()
        self._masters.assign(min(start, self.master.numel()), values)

    def ready(self) -> None:
        """And of its masters."""
        self.own.ready()
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
        self.own.ready()
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
