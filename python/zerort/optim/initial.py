"""State that an optimizer's constructor makes, and has it stepped since.

Most optimizers make state when they first step; some do in the constructor (Adagrad's sum starts at
a number). Its tensors belong to the module's parameters, which are about to become pieces of flat
buffers, so it is kept as what it is made from: a number for each element, or a value for the whole
parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerort.optim.chain import members_of

__all__ = ["InitialState", "has_stepped"]

State = dict[str, Any]


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the optimizer's state holds more than the same number for each element, or a value
    that is not zero.
    """
    return any(
        bool((value != value.reshape(-1)[0]).any())
        if isinstance(owner, Tensor) and value.shape == owner.shape
        else bool(value.any())
        for owner, value in _tensors(optimizer)
    )


def _tensors(optimizer: Optimizer) -> Iterator[tuple[Any, Tensor]]:
    """Whose state, and a tensor of it. Some keep state under a name, for no parameter."""
    for owner, state in optimizer.state.items():
        for value in state.values() if isinstance(state, dict) else (state,):
            if isinstance(value, Tensor) and value.numel():
                yield owner, value


@dataclass(frozen=True)
class Fill:
    """A tensor of one number for each element of the parameter."""

    number: float
    dtype: torch.dtype | None
    """None: that of the tensor it belongs to."""

    def like(self, tensor: Tensor, floats: torch.dtype | None) -> Tensor:
        """The state of `tensor`, in its shape; floating-point numbers in `floats`, or in its own
        dtype.
        """
        dtype = self.dtype or floats
        return torch.full_like(tensor, self.number, dtype=dtype, requires_grad=False)


class InitialState:
    """What the constructor gave to each of `params`. Parameters with the same have one label."""

    def __init__(self, optimizer: Optimizer, params: Sequence[nn.Parameter]) -> None:
        states: list[State] = [optimizer.state.get(parameter, {}) for parameter in params]
        elementwise = _elementwise(params, states)
        self._shared = [
            {
                owner: copy.deepcopy(state)
                for owner, state in member.state.items()
                if not isinstance(owner, Tensor)
            }
            for member in members_of(optimizer)
        ]
        self._kinds: list[State] = [{}]
        self._labels = [
            self._label(_recipe(parameter, state, elementwise))
            for parameter, state in zip(params, states, strict=True)
        ]

    def begin(self, optimizer: Optimizer) -> None:
        """Leaves the optimizer with what belongs to no parameter, as the constructor made it."""
        for member, shared in zip(members_of(optimizer), self._shared, strict=True):
            member.state.clear()
            member.state.update(copy.deepcopy(shared))

    def label(self, param: int) -> int:
        """Which state parameter `param` of the list begins with; 0 is none."""
        return self._labels[param]

    def of(self, param: int, tensor: Tensor, floats: torch.dtype | None = None) -> State:
        """That state for a tensor of elements of this parameter, in any shape; in `floats` what
        would be in the tensor's dtype.
        """
        return {
            key: value.like(tensor, floats) if isinstance(value, Fill) else copy.deepcopy(value)
            for key, value in self._kinds[self._labels[param]].items()
        }

    def _label(self, recipe: State) -> int:
        for label, kind in enumerate(self._kinds):
            if kind.keys() == recipe.keys() and all(_same(kind[k], recipe[k]) for k in kind):
                return label
        self._kinds.append(recipe)
        return len(self._kinds) - 1


def _elementwise(params: Sequence[nn.Parameter], states: Sequence[State]) -> set[str]:
    """Keys of state that has the parameter's shape; one element alone cannot tell a step count from
    a moment, so larger parameters are asked first.
    """
    large: dict[str, bool] = {}
    single: set[str] = set()
    for parameter, state in zip(params, states, strict=True):
        for key, value in state.items():
            if isinstance(value, Tensor) and parameter.numel() > 1:
                large[key] = value.shape == parameter.shape
            elif isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                single.add(key)
    return {key for key, found in large.items() if found} | (single - large.keys())


def _recipe(parameter: nn.Parameter, state: State, elementwise: set[str]) -> State:
    recipe: State = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or key not in elementwise:
            recipe[key] = copy.deepcopy(value)
        elif value.numel():
            kept = value.dtype if value.dtype != parameter.dtype else None
            # Made before the parameter was cast, it is of the old dtype and means the new one.
            dtype = None if value.is_floating_point() else kept
            recipe[key] = Fill(value.reshape(-1)[0].item(), dtype)
    return recipe


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)
