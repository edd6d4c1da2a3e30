"""What an engine keeps of each parameter beside its values: the optimizer's copy, the reduced
gradient, the optimizer's state.

A `Field` reads and writes this rank's fragment, (n,), in the order in which a parameter's elements
lie in memory. Nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zerort.device import device_for
from zerort.errors import StepError
from zerort.optim.segments import Segment
from zerort.utils.held import Held, Place

__all__ = ["GRADIENT", "MASTER", "Field", "State"]

_FP32 = 4
"""Bytes."""


class Field(Protocol):
    """One kind of values of a parameter."""

    def place(self, held: Held) -> Place[Any]:
        """Where they lie."""

    def read(self, held: Held) -> Tensor | None:
        """This rank's fragment; None where there is none (yet)."""

    def write(self, held: Held, fragment: Tensor) -> None:
        """Replaces it. Raises `StepError` where there is none."""


class Master:
    """The optimizer's copy, in fp32, or fp64 where the parameter is."""

    def place(self, held: Held) -> Place[Any]:
        """With its owner, where it has one."""
        return held.kept

    def read(self, held: Held) -> Tensor | None:
        """What the optimizer has, widened where that is of 16 bits, with what has been written into
        the parameter since.
        """
        held.take_writes()
        fragment = held.kept.fragment(held.kept.bucket.master)
        return fragment.float() if fragment.itemsize < _FP32 else fragment

    def write(self, held: Held, fragment: Tensor) -> None:
        """The parameter follows, in its own dtype."""
        held.take_writes()
        held.kept.bucket.assign(held.kept.own[0], fragment)


class Gradient:
    """The window's reduced gradient, between backward and step: over ranks and accumulation steps
    a mean, in fp16 still times the loss scale.
    """

    def place(self, held: Held) -> Place[Any]:
        """In shards."""
        return held.summed

    def read(self, held: Held) -> Tensor | None:
        """None while nothing has been reduced, and for a frozen parameter."""
        if not held.owner.has_sums or not held.requires_grad:
            return None
        return held.summed.fragment(held.bucket.accum.tensor)

    def write(self, held: Held, fragment: Tensor) -> None:
        """The norm follows."""
        mine = self.read(held)
        if mine is None:
            raise StepError(
                f"parameter {held.name} has no reduced gradient: there is one after the backward "
                "whose gradients are reduced, until step()"
            )
        mine.copy_(fragment)
        shard = held.bucket.reduced_shard
        held.bucket.squares = device_for(shard.tensor.device).squared_norm(shard)


@dataclass(frozen=True)
class State:
    """The optimizer's state called `key`."""

    key: str

    def place(self, held: Held) -> Place[Any]:
        """With the master."""
        return held.kept

    def read(self, held: Held) -> Tensor | None:
        """None before the optimizer has made any. Raises `StepError` for a key that it has not, or
        that is not of the parameter's shape.
        """
        pieces = list(held.segments())
        if not pieces:
            return held.kept.fragment(held.kept.bucket.master).clone()  # empty
        values = [self._value(held, segment) for segment, _, _ in pieces]
        found = [value for value in values if value is not None]
        if not found or len(found) < len(values):
            return None
        lo, hi = held.kept.own
        fragment = torch.empty(hi - lo, dtype=found[0].dtype, device=found[0].device)
        for (segment, first, last), value in zip(pieces, found, strict=True):
            part = segment.flattened(value).narrow(0, first - segment.start, last - first)
            fragment.narrow(0, first - lo, last - first).copy_(part)
        return fragment

    def write(self, held: Held, fragment: Tensor) -> None:
        """Into what the optimizer holds."""
        lo, _ = held.kept.own
        for segment, first, last in held.segments():
            value = self._value(held, segment)
            if value is None:
                raise StepError(
                    f"the optimizer has no state of parameter {held.name} yet: it is made by the "
                    "first step that trains it"
                )
            flat = segment.flattened(value)
            part = fragment.narrow(0, first - lo, last - first)
            flat.narrow(0, first - segment.start, last - first).copy_(part)
            if flat is not value:
                value.copy_(segment.form.over(flat) if segment.form is not None else flat)

    def _value(self, held: Held, segment: Segment) -> Tensor | None:
        state = held.owner.optimizer.optimizer.state.get(segment.tensor)
        if not state:
            return None
        value = state.get(self.key)
        if isinstance(value, Tensor) and value.shape == segment.tensor.shape:
            return value
        names = [
            key
            for key, other in state.items()
            if isinstance(other, Tensor) and other.shape == segment.tensor.shape
        ]
        raise StepError(
            f"the optimizer has no state {self.key!r} of parameter {held.name}'s shape: it has "
            f"{', '.join(map(str, names)) or 'none'}"
        )


MASTER, GRADIENT = Master(), Gradient()
