"""All buckets of a model, and that its parameters stay in them.

What this guarantees: one that has left its bucket or its module is found and named before its
gradient is lost. What it does not do: no communication, no knowledge of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from zerort import _core
from zerort.errors import StepError
from zerort.memory.buckets import FlatBucket
from zerort.memory.held import HeldBucket, Layout
from zerort.memory.parameters import PlannedParameter
from zerort.memory.places import Places
from zerort.memory.registry import Registry
from zerort.memory.rooms import Kept, Room, Stepped, kept_layout, rooms_of
from zerort.memory.unintercepted import unintercepted

__all__ = ["FlatModel"]


class FlatModel:
    """All buckets of a model. Construction moves every planned parameter into its bucket, but for
    those that are or have been sharded: their values move one bucket at a time, by
    `FlatBucket.adopt`.
    """

    def __init__(
        self, module: nn.Module, planned: Sequence[PlannedParameter], layout: Layout
    ) -> None:
        self.names = [member.name for member in planned]
        self.params = [member.tensor for member in planned]
        self.state = 0
        """How often values have been published."""
        self.layouts = 0
        """How often buckets have been made."""
        self.lay_out(planned, layout)
        self._registry = Registry(module, self.names, self.params, warns=layout.rank == 0)

    def lay_out(self, planned: Sequence[PlannedParameter], layout: Layout) -> None:
        """Makes the buckets, also in place of others; `planned` are the same parameters always."""
        self.layouts += 1
        self.buckets: list[HeldBucket] = [
            _kind(spec)(layout, spec, [planned[index] for index in spec.params])
            for spec in layout.plan.buckets
        ]
        self.trained = [bucket for bucket in self.buckets if isinstance(bucket, FlatBucket)]
        """Those that an optimizer has."""
        self._members = {
            id(parameter): (bucket, position)
            for bucket in self.trained
            for position, parameter in enumerate(bucket.params)
        }
        self.rooms: dict[int, Room] = rooms_of(layout, self.trained)
        """Of exchanged buckets, by their number."""
        self.layout = kept_layout(layout.plan, planned, self.rooms)
        """Where masters and the optimizer's state lie: a room in the place of its bucket."""
        self._updated = [parameter for bucket in self.trained for parameter in bucket.params]
        held = [bucket for bucket in self.buckets if not isinstance(bucket, FlatBucket)]
        self._held = [parameter for bucket in held for parameter in bucket.params]
        self._frozen = [
            (name, parameter)
            for bucket in held
            for name, parameter in zip(bucket.names, bucket.params, strict=True)
            if not parameter.requires_grad
        ]
        self._places = Places(self.names, self.params, self.buckets)

    @property
    def sharded(self) -> list[HeldBucket]:
        """Buckets whose parameters' values are in shards, and nowhere else."""
        return [bucket for bucket in self.buckets if bucket.is_sharded]

    def place_of(self, parameter: nn.Parameter) -> tuple[FlatBucket, int]:
        """The bucket of a parameter that an optimizer has, and its position there."""
        return self._members[id(parameter)]

    @property
    def stepped(self) -> list[Stepped]:
        """What the optimizer steps over."""
        return [self.rooms.get(bucket.spec.id, bucket) for bucket in self.trained]

    @property
    def kept(self) -> list[Kept]:
        """What a checkpoint holds, by number, as `layout` has it."""
        return [self.rooms.get(bucket.spec.id, bucket) for bucket in self.buckets]

    @property
    def tree_changes(self) -> int:
        """How often the module's tree has been found changed."""
        return self._registry.changes

    @unintercepted
    def active(self) -> list[bool]:
        """Which parameters require grad now."""
        return [parameter.requires_grad for parameter in self.params]

    @unintercepted
    def check(self) -> None:
        """Raises `StepError` naming the first parameter that has left its module or its bucket, or
        that nothing would train.
        """
        self._registry.check()
        unfrozen = next((name for name, held in self._frozen if held.requires_grad), None)
        if unfrozen is not None:
            raise StepError(
                f"parameter {unfrozen} requires grad now, but at zerort.initialize it was frozen "
                "and in no group of the optimizer, so that only its values are kept, in shards: "
                "give it to the optimizer, frozen, before zerort.initialize, and unfreeze it then; "
                "or freeze it again with requires_grad_(False)"
            )
        self._places.check()

    def take_writes(self) -> None:
        """Brings to the masters what something outside a step has written into parameters, in
        whatever way.
        """
        asked = [(bucket, bucket.doubt) for bucket in self.trained]
        doubted = [(bucket, doubt) for bucket, doubt in asked if doubt is not None]
        written = torch.stack([doubt for _, doubt in doubted]).tolist() if doubted else []
        found = [bucket for (bucket, _), has in zip(doubted, written, strict=True) if has]
        found += [bucket for bucket, doubt in asked if doubt is None and bucket.finds_writes]
        for bucket in found:
            bucket.take_writes()

    @unintercepted
    def drop_strays(self) -> None:
        """Forgets gradients of parameters that no optimizer has."""
        for parameter in self._held:
            parameter.grad = None

    @unintercepted
    def published(self) -> None:
        """Tells autograd that the parameters were written through their flat buffers, which it
        cannot see.
        """
        self.state += 1
        torch.autograd.graph.increment_version(self._updated)


def _kind(spec: _core.Bucket) -> type[HeldBucket]:
    return HeldBucket if spec.group is None else FlatBucket
