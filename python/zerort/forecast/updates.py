"""What updates a model without memory: the configuration's optimizer, what it asks of the plan, and
what it keeps.

What this guarantees: groups, grains and costs are those that an engine would find. What it does not
do: it tries no optimizer on the model's parameters, which have no values. Where one cannot be made
over them, there is one group, of parameters that may be cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zerort import optim
from zerort.config import Config
from zerort.errors import ConfigError
from zerort.memory import PlannedParameter
from zerort.optim import Abilities, examine, is_known, members_of
from zerort.optim.muon import is_muon
from zerort.start.grains import Grains, grains_of
from zerort.zero.estimates import state_bytes, whole_state_bytes

__all__ = ["Updates", "asks_for_matrices"]


@dataclass(frozen=True)
class Updates:
    """An optimizer over its groups."""

    settings: Config
    groups: Sequence[Mapping[str, Any]]
    optimizer: Optimizer | None = None
    abilities: Sequence[Abilities] = ()
    """Of each that it is made of."""

    @classmethod
    def of(cls, settings: Config, model: nn.Module, *, trained_only: bool) -> Updates:
        """The configuration's over `model`; where it has none, what requires grad is one group."""
        asked = settings.optimizer
        every = asked is not None and not trained_only
        params = [p for p in model.parameters() if every or p.requires_grad]
        if asked is not None:
            try:
                made = optim.build(asked.type, params, asked.params, model)
            except ConfigError:  # some will not have parameters without memory
                made = None
            if made is not None and is_known(made):
                can = [examine(member) for member in members_of(made)]
                return cls(settings, made.param_groups, made, can)
        return cls(settings, [{"params": params}])

    @property
    def whole(self) -> set[int]:
        """Groups of which it looks at whole parameters."""
        members = () if self.optimizer is None else members_of(self.optimizer)
        found, first = set(), 0
        for member, can in zip(members, self.abilities, strict=True):
            found |= {first + index for index in can.whole}
            first += len(member.param_groups)
        return found

    def grains(self, planned: Sequence[PlannedParameter]) -> Grains:
        """What of each parameter may not be cut, and what its update costs."""
        return grains_of(self.optimizer, self.abilities, planned)

    def kept(self, group: int, dtype: torch.dtype, numel: int) -> int:
        """Bytes of state of `numel` elements of a group that are updated one by one in `dtype`."""
        # Muon has the matrices among its groups, and another optimizer the rest
        matrices = self.groups[group].get("use_muon", True)
        return state_bytes(self.settings, dtype, numel, matrices=matrices)

    def kept_of_whole(self, dtype: torch.dtype, shape: Sequence[int]) -> int:
        """The same of a parameter that is updated whole."""
        assert self.optimizer is not None
        if len(shape) > 2 and any(map(is_muon, members_of(self.optimizer))):
            shape = shape[0], math.prod(shape[1:])  # as it is shown them
        return whole_state_bytes(self.settings, dtype, shape)


def asks_for_matrices(settings: Config) -> bool:
    """Whether the configuration's optimizer looks at whole ones, and has state of its own of them:
    a number of elements alone says nothing of that.
    """
    matrix = nn.Parameter(torch.empty(2, 2, device="meta"))
    return bool(Updates.of(settings, nn.ParameterList([matrix]), trained_only=False).whole)
