"""A bucket's parameters on this rank.

What this guarantees: the module's parameters are views of their buckets' values for as long as the
engine lives. What it does not do: no communication, no knowledge of steps, nor of optimizers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zerort import _core
from zerort.device import LINE
from zerort.memory.flat import Memory
from zerort.memory.homes import Homes
from zerort.memory.moved import Carrier
from zerort.memory.origins import Origin
from zerort.memory.own import OwnPart
from zerort.memory.parameters import PlannedParameter
from zerort.memory.secondary import Secondary
from zerort.memory.values import Freeable, Resident

__all__ = ["HeldBucket", "Layout"]


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
    only between `bring` and `free`. `own` is the part of them that this rank keeps: its shard, or
    the whole where nothing is sharded. It is a part of `values`, or, where they are sharded, memory
    of its own, which may be the host's. `master` is what a checkpoint holds of it: `owned` itself,
    where no optimizer knows more. `is_common` says that all ranks take the same values, so that
    none have to be sent. `secondary` is what it keeps of its host's part of sharded values, beside
    its own.
    """

    __slots__ = (
        "_keeps_secondary",
        "_origins",
        "forms",
        "has_parted",
        "is_common",
        "master",
        "names",
        "own",
        "params",
        "secondary",
        "spec",
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
        self.has_parted = False
        """Who has the parameters now has this rank's part of them too."""
        self.secondary: Secondary | None = None
        self._keeps_secondary = layout.keeps_secondary
        self.values: Resident | Freeable
        if spec.sharded:
            first, last = self.names[0], self.names[-1]
            contents = first if first == last else f"{first} .. {last}"
            self.values = Freeable(spec, self.forms, dtype, device, contents)
            owned = Memory.zeros(0, dtype, device)
        else:
            self.values = Resident(plan, spec, self.forms, dtype, device)
            owned = self.values.memory if whole else self.values.shard(rank)
        start = 0 if whole else rank * spec.shard_numel
        self.own = OwnPart(owned, start, layout.homes.shard_host_of(spec))
        self.master = self.owned.tensor
        self._origins: Sequence[Origin] = [member.origin for member in members]
        self.is_common = all(origin.is_common for origin in self._origins)
        if not spec.sharded and not any(origin.is_common for origin in self._origins):
            self.adopt()  # so that a parameter's own memory goes before the next bucket's comes

    @property
    def owned(self) -> Memory:
        """What this rank keeps."""
        return self.own.memory

    @property
    def start(self) -> int:
        """The element of the bucket at which that begins."""
        return self.own.start

    @property
    def revision(self) -> int:
        """How often that has been replaced, or has gone elsewhere."""
        return self.own.revision

    @property
    def shard_on_host(self) -> bool:
        """Whether that is the host's memory, beside a device."""
        return self.own.host is not None

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
                self.own.send(self._slice())

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
        return self.own.first_change(self._slice())

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
                self.own.receive(self._slice())

    def _make_room(self) -> None:
        """Memory for this rank's part: not before it is needed, for until then the values are
        somewhere else.
        """
        if self.own.reserve(self.spec.shard_numel):
            self.master = self.owned.tensor

    def ready(self) -> None:
        """The host may write what it has of this bucket."""
        self.own.ready()

    def take_part(self) -> None:
        """The values have been written, while they were whole: this rank's slice of them is what
        counts.
        """
        if isinstance(self.values, Freeable):
            with torch.no_grad():
                self.own.receive(self._slice())
                self.take_writes()

    def free(self) -> None:
        """Gives the memory of sharded parameters' values back."""
        if isinstance(self.values, Freeable):
            self.values.free(self.params)
            self.own.freed()

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
            self.own.release()
            self.master = self.owned.tensor
        if self.values.is_whole:
            self.part_with_aliases()
        return shard

    def move_values(self, carry: Carrier) -> None:
        """What lies on the device of the parameters, elsewhere, and parameters that are whole with
        it. Nothing is under way, and nothing sharded is whole.
        """
        self.own.replaced()
        if self.secondary is not None:
            self.secondary.release()
        if isinstance(self.values, Resident):
            self.values.move(carry)
            for parameter, view in zip(self.params, self.values.views(), strict=True):
                parameter.data = view
        elif self.own.host is None:
            self.owned.move(carry)
        self.master = self.owned.tensor

    @property
    def length(self) -> int:
        """Of what this rank keeps, in elements."""
        return self.owned.tensor.numel()

    def assign(self, start: int, values: Tensor) -> None:
        """Replaces what this rank keeps, (n,) from `start` of the owned part on."""
        self.ready()
        self.own.replaced()
        self.owned.tensor.narrow(0, start, values.numel()).copy_(values)

    def write_back(self) -> None:
        """The parameters that this rank owns follow `master`."""

    def take_writes(self) -> None:
        """`master` follows what has been written into the parameters that this rank owns."""

    def _slice(self) -> Tensor:
        assert isinstance(self.values, Freeable)
        return self.values.part(self.start, self.spec.shard_numel)
