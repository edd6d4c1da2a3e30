"""Which gradients have come, read from `.grad`: for those that no hook tells of.

Two questions. Within a pass: is the rest of a bucket there, as its sentinel says? Outside one: has
a backward without announcement brought a gradient? It decides nothing and changes no `.grad`.

A gradient that has come has either set `.grad` or been added to it in place, which its version
counter shows. So where earlier micro-batches have left something in `.grad`, what was there before
the backward is noted.
"""

from __future__ import annotations

from torch import Tensor

from zerort.grads.course import Commands
from zerort.memory import FlatModel, HeldBucket

__all__ = ["Arrivals"]

Before = tuple[Tensor | None, int]
"""A `.grad` before the backward, and its version."""


class Arrivals:
    """Reads `.grad` of a model's parameters."""

    def __init__(self, flat: FlatModel) -> None:
        self._flat = flat
        self._commands: Commands = ()
        self._reached = 0
        self._before: list[Before] | None = None
        self._resting: list[Before] | None = None
        self._unannounced = False

    def rest(self) -> None:
        """What is in `.grad` now is no news in the next pass."""
        self._resting = self._now()

    def new(self) -> bool:
        """Whether `.grad` has anything that was not there at `rest`, or when a pass took all."""
        if self._resting is None:
            return any(parameter.grad is not None for parameter in self._flat.params)
        return self._any_since(self._resting)

    def mark(self) -> None:
        """A backward begins that is not announced."""
        self._before = self._now()
        self._unannounced = True

    def announced(self) -> None:
        """Now it is."""
        self._unannounced = False

    def unannounced(self) -> bool:
        """Whether a gradient has come since `mark`, and has not been announced."""
        return self._unannounced and self._before is not None and self._any_since(self._before)

    def begin(self, commands: Commands) -> None:
        """A pass begins, at the head of its list."""
        self._commands, self._reached = commands, 0
        if self._before is None:
            self._before = self._resting
        self._resting = None

    def reach(self, hi: int, place: int) -> int:
        """How far below `hi` the list may run before a bucket lacks a gradient; what is below
        `place` has run.
        """
        self._reached = max(self._reached, place)
        while self._reached < hi:
            kind, bucket = self._commands[self._reached]
            if kind == "launch" and self._is_lacking(self._flat.buckets[bucket]):
                break
            self._reached += 1
        return min(hi, self._reached)

    def end(self) -> None:
        """The backward is over."""
        self._before = None
        self._unannounced = False

    def _any_since(self, befores: list[Before]) -> bool:
        pairs = zip(self._flat.params, befores, strict=True)
        return any(_is_new(parameter.grad, before) for parameter, before in pairs)

    def _is_lacking(self, bucket: HeldBucket) -> bool:
        if self._before is None:
            return any(
                parameter.grad is None and parameter.requires_grad for parameter in bucket.params
            )
        befores = [self._before[index] for index in bucket.spec.params]
        pairs = zip(bucket.params, befores, strict=True)
        return any(
            parameter.requires_grad and not _is_new(parameter.grad, before)
            for parameter, before in pairs
        )

    def _now(self) -> list[Before]:
        gradients = [parameter.grad for parameter in self._flat.params]
        return [(gradient, -1 if gradient is None else gradient._version) for gradient in gradients]


def _is_new(gradient: Tensor | None, before: Before) -> bool:
    return gradient is not None and (gradient is not before[0] or gradient._version != before[1])
