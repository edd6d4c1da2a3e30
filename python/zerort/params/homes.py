"""Where a parameter belongs whose values are elsewhere: who gathers them, and under which name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "HOMES",
    "Home",
    "Keeper",
    "Writing",
    "forget",
    "keeper_of",
    "kind_of",
    "meta_like",
    "name_of",
]


class Keeper(Protocol):
    """Who gathers a parameter's values."""

    def use(self, params: Sequence[nn.Parameter], call: Callable[[], Any]) -> Any:
        """Runs `call`, which reads the values of `params` although none of their modules does.

        Raises `StepError` naming a parameter where there is no pass that could gather them.
        """

    def write(self, access: Writing, call: Callable[[], Any]) -> Any:
        """Runs `call`, which writes parameters in place. Raises `StepError` where that would be
        lost.
        """

    def detached(self, parameter: nn.Parameter) -> Tensor | None:
        """What stands for the values where they are not to be read now; None where `use` is to
        decide.
        """

    def copied(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """A copy, sharded as well; None where there can be none."""

    def hold(
        self, params: Sequence[nn.Parameter], modifier: int | None
    ) -> AbstractContextManager[None]:
        """Within, `params` are whole and themselves; all ranks enter and leave together. With
        `modifier`, what that rank wrote is everybody's value behind it.
        """


class Writing(NamedTuple):
    """An operation that writes parameters in place."""

    what: str
    """Its name."""
    written: Sequence[nn.Parameter]
    params: Sequence[nn.Parameter]
    """All of the same keeper's that it touches, the written among them."""


class Home(NamedTuple):
    """Where a parameter belongs."""

    keeper: Keeper
    name: str
    kind: type[nn.Parameter]
    """Its class while its values are there."""


HOMES: dict[int, Home] = {}
"""By the parameter's id, between `enter` and `leave`."""


def keeper_of(parameter: Tensor) -> Keeper | None:
    """Who gathers the parameter's values; None where they are whole for good."""
    home = HOMES.get(id(parameter))
    return None if home is None else home.keeper


def name_of(parameter: nn.Parameter) -> str:
    """Under which it was registered when it was sharded."""
    home = HOMES.get(id(parameter))
    return "?" if home is None else home.name


def kind_of(parameter: nn.Parameter) -> type[nn.Parameter]:
    """Its class while its values are there."""
    return HOMES[id(parameter)].kind


def forget(key: int) -> None:
    """The parameter of this id is no more."""
    HOMES.pop(key, None)


def meta_like(parameter: Tensor) -> Tensor:
    """A tensor of the parameter's shape, strides and dtype without values."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
        )
