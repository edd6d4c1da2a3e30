"""Which optimizer trains: the one that is given, or the configuration's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from zerort import optim
from zerort.config import Config
from zerort.errors import ConfigError, PlanError
from zerort.optim import Abilities, examine, has_stepped

__all__ = ["abilities_of", "choose_optimizer"]


def choose_optimizer(
    settings: Config, model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None
) -> Optimizer:
    """`optimizer` itself, what it makes of the parameters, or the configuration's.

    Raises `ConfigError` where there is none, `PlanError` where it has state.
    """
    params = list(model.parameters() if model_parameters is None else model_parameters)
    if isinstance(optimizer, Optimizer):
        chosen = optimizer
    elif callable(optimizer):
        chosen = optimizer(params)
    elif settings.optimizer is not None:
        chosen = optim.build(settings.optimizer.type, params, settings.optimizer.params)
    else:
        raise ConfigError(
            "no optimizer: give initialize(optimizer=...) or the key optimizer {type, params}"
        )
    if has_stepped(chosen):
        raise PlanError(
            "the optimizer has state already, and its tensors are about to become shards: make it "
            "anew, and load state with engine.load_checkpoint; what its constructor itself makes "
            "may be zeros, or one number for all elements"
        )
    return chosen


def abilities_of(optimizer: Optimizer, *, shards: bool) -> Abilities:
    """What the optimizer can be given; `shards` says what the stage gives it.

    Raises `ConfigError` where that is more than it can do.
    """
    name, can = type(optimizer).__name__, examine(optimizer)
    if can.never is not None:
        raise ConfigError(f"optimizer {name} is refused at every stage: {can.never}")
    if can.shards is not None and shards:
        raise ConfigError(
            f"optimizer {name} cannot run on shards: {can.shards}. Use zero_optimization.stage 0, "
            "which keeps the optimizer whole"
        )
    return can
