"""A copy of an optimizer, to be stepped in its place."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Twin"]


class Twin:
    """A copy of an optimizer that shares no parameter, state or option with it.

    `torch.optim.Optimizer` says what of itself is copied and leaves out the attributes of
    subclasses, so its dictionary is copied here; what refuses to be copied is shared.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._memo: dict[int, Any] = {}
        self._others: list[nn.Parameter] = []
        self._memo[id(optimizer.state)] = defaultdict(dict)
        self._stand_in(p for group in optimizer.param_groups for p in group["params"])
        self.optimizer = self._copied(optimizer)
        for index, group in enumerate(self.optimizer.param_groups):
            self.give(index, [])
            _start_moving(group)
        train = getattr(type(self.optimizer), "train", None)
        if callable(train):  # one that is evaluated at other weights steps in training alone
            train(self.optimizer)

    def give(self, index: int, params: list[nn.Parameter]) -> None:
        """Puts `params` into a group, in place: the optimizer may hold the very list."""
        self.optimizer.param_groups[index]["params"][:] = params

    def drop_empty(self) -> None:
        """Leaves out groups without parameters."""
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g["params"]]

    def step(self) -> None:
        """What the class does, without what schedulers have put before it on the instance."""
        type(self.optimizer).step(self.optimizer)

    def has_moved_others(self) -> bool:
        """Whether what stands for the module's parameters, in copies of the optimizer's own
        attributes, has changed.
        """
        return any(bool((parameter != 1).any()) for parameter in self._others)

    def _stand_in(self, params: Iterator[nn.Parameter]) -> None:
        for parameter in params:
            if id(parameter) not in self._memo:
                other = nn.Parameter(torch.ones(1, device=parameter.device))
                other.grad = torch.ones_like(other)
                self._memo[id(parameter)] = other
                self._others.append(other)

    def _copied(self, optimizer: Optimizer) -> Optimizer:
        twin: Optimizer = object.__new__(type(optimizer))
        self._memo[id(optimizer)] = twin
        for value in vars(optimizer).values():
            if isinstance(value, nn.Module):
                self._stand_in(value.parameters())
            elif isinstance(value, Optimizer) and id(value) not in self._memo:
                self._copied(value)
        twin.__dict__.update({key: self._copy(value) for key, value in vars(optimizer).items()})
        for name in ("step", "train", "eval"):
            twin.__dict__.pop(name, None)
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            if hooks in twin.__dict__:
                twin.__dict__[hooks] = OrderedDict()
        return twin

    def _copy(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:
            return value


def _start_moving(group: dict[str, Any]) -> None:
    """A rate of zero, before a warm-up, would show nothing."""
    rate = group.get("lr")
    if isinstance(rate, Tensor) and not rate.any():
        group["lr"] = torch.full_like(rate, 0.01)
    elif not isinstance(rate, Tensor) and rate == 0:
        group["lr"] = 0.01
