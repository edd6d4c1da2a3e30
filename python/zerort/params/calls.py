"""Calls of modules: what a module needs while it is called, and which of its calls are open.

What this guarantees: a module's own parameters are themselves within its calls alone, and one that
is written there is named. What it does not do: it brings nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from zerort.memory import unintercepted, version_of
from zerort.params import sharded
from zerort.params.passes import Passes
from zerort.params.pins import Pins

__all__ = ["Call", "eager", "unseen"]

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Call:
    """A module as something that needs units while it is called."""

    name: str
    entry: int
    """Its number among the modules."""
    units: int
    """Number of the set of its units."""
    params: Sequence[nn.Parameter] = ()
    depth: int = field(default=0, init=False)
    """How many of its calls are open."""
    versions: Sequence[int] = field(default=(), init=False)
    """Of its parameters, since the first of them began."""
    version: Callable[[Tensor], int] = field(init=False)
    """Reads a parameter's."""
    kinds: Sequence[tuple[type, type, Sequence[nn.Parameter]]] = field(init=False)
    """Its parameters by their class while they are themselves, with the class that guards them."""

    def __post_init__(self) -> None:
        kinds = list(dict.fromkeys(map(type, self.params)))
        plain = kinds in ([], [nn.Parameter])
        self.version = version_of if plain else eager(unintercepted(version_of))
        self.kinds = [
            (kind, sharded.guarded(kind), [p for p in self.params if type(p) is kind])
            for kind in kinds
        ]

    def conceal(self, passes: Passes, pins: Pins) -> None:
        """The last of its calls is over: its parameters' values are not to be read, unless they are
        kept whole.
        """
        now = list(map(self.version, self.params))
        before = self.versions or now  # an interrupt may come before they are read
        for parameter, old, new in zip(self.params, before, now, strict=True):
            if id(parameter) not in pins.exposed:
                if new != old:
                    passes.lose(parameter)
                sharded.conceal(parameter)
        self.versions = ()


def eager(call: Callable[..., T]) -> Callable[..., T]:
    """`call`, within which nothing is compiled."""
    wrapped: Callable[..., T] = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return wrapped


def unseen(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook itself, which breaks the graph of a compiled module: what it does is no computation.
    A wrapper would cost as much as the hook; what it calls of Python's has one.
    """
    unseen: Callable[..., None] = torch._dynamo.decorators.skip(hook)
    return unseen
