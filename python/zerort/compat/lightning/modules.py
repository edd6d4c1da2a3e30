"""A module before and behind its engine: evaluated in shards, and its weights given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import zerort
from zerort.params.sharded import keeper_of
from zerort.zero import GatheredParameters

__all__ = ["SetUp", "Whole", "forward_only", "is_sharded"]

_OF_TRAINING = ("optimizer", "scheduler")


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter's values are spread over the ranks, by an engine or behind one."""
    return any(keeper_of(parameter) is not None for parameter in module.parameters())


def forward_only(module: nn.Module, settings: Mapping[str, Any]) -> zerort.Engine:
    """An engine over `module` that trains nothing, whatever `settings` say of an optimizer."""
    kept = {key: value for key, value in settings.items() if key not in _OF_TRAINING}
    return zerort.initialize(model=module, config=kept)[0]


class SetUp(nn.Module):
    """A module that was set up without an optimizer: an engine is behind its forward, which may
    change, or at first below stage 3 none.
    """

    def __init__(self, module: nn.Module, engine: zerort.Engine | None) -> None:
        super().__init__()
        self.module = module
        self._behind = [] if engine is None else [engine]  # a list, lest it be another child

    @property
    def engine(self) -> zerort.Engine | None:
        """What runs its forward."""
        return self._behind[0] if self._behind else None

    def hand_to(self, engine: zerort.Engine) -> None:
        """From here on `engine` runs its forward."""
        self._behind[:] = [engine]

    @property
    def trains(self) -> bool:
        """Whether its engine has an optimizer."""
        return self.engine is not None and self.engine.optimizer is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The engine's, or the module's."""
        return (self.module if self.engine is None else self.engine)(*args, **kwargs)

    def owns(self, optimizer: Any) -> bool:
        """Whether any of the optimizer's parameters is the module's."""
        mine = {id(parameter) for parameter in self.module.parameters()}
        return any(id(each) in mine for group in optimizer.param_groups for each in group["params"])


class Whole:
    """Copies of a module's sharded parameters in this rank's host memory, taken while its engine
    lives. All ranks take them together, one parameter at a time.
    """

    def __init__(self, module: nn.Module) -> None:
        self._values: dict[int, Tensor] = {}
        for parameter in module.parameters():
            if keeper_of(parameter) is not None:
                with GatheredParameters(parameter), torch.no_grad():
                    self._values[id(parameter)] = parameter.detach().to("cpu", copy=True)

    def give_back(self, module: nn.Module) -> None:
        """Behind the engine: the module has whole parameters again, new ones with these values."""
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                value = None if parameter is None else self._values.get(id(parameter))
                if parameter is not None and value is not None:
                    part._parameters[name] = made.setdefault(
                        id(parameter), nn.Parameter(value, requires_grad=parameter.requires_grad)
                    )
