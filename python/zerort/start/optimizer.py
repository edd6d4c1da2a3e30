"""Which optimizer trains: the one that is given, or the configuration's; or none does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from zerort import optim
from zerort.config import Config
from zerort.errors import ConfigError, PlanError
from zerort.memory import FlatModel
from zerort.optim import (
    ALL_FROZEN,
    NONE_GIVEN,
    Abilities,
    NoOptimizer,
    ShardOptimizer,
    Update,
    examine,
    has_stepped,
)

__all__ = ["Chosen", "choose_optimizer"]


@dataclass(frozen=True)
class Chosen:
    """The optimizer, or None where there is none, for the `reason`."""

    optimizer: Optimizer | None
    reason: str = ""

    @property
    def groups(self) -> Mapping[int, int] | None:
        """By id(parameter) its group; None where there is no optimizer."""
        if self.optimizer is None:
            return None
        groups = enumerate(self.optimizer.param_groups)
        return {id(p): index for index, group in groups for p in group["params"]}

    def able(self, *, shards: bool) -> Abilities | None:
        """What the optimizer can be given; `shards` says what the stage gives it.

        Raises `ConfigError` where that is more than it can do.
        """
        return None if self.optimizer is None else _abilities_of(self.optimizer, shards=shards)

    def over(self, flat: FlatModel, abilities: Abilities | None) -> Update:
        """What updates the buckets."""
        if self.optimizer is None or abilities is None:
            return NoOptimizer(self.reason)
        return ShardOptimizer(self.optimizer, flat, abilities)


def choose_optimizer(
    settings: Config, model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None
) -> Chosen:
    """`optimizer` itself, what it makes of the parameters, or the configuration's; none where
    nothing was given. One that the configuration alone asks for is not made for a model without
    a parameter that requires grad, such as the frozen reference beside a model that trains with
    the same configuration.

    Raises `ConfigError` for something else than an optimizer, `PlanError` where it has state or
    nothing to train.
    """
    if optimizer is None and settings.optimizer is None:
        return Chosen(None, NONE_GIVEN)
    if optimizer is None and not any(p.requires_grad for p in model.parameters()):
        return Chosen(None, ALL_FROZEN)
    _refuse_empty(model)
    params = list(model.parameters() if model_parameters is None else model_parameters)
    if isinstance(optimizer, Optimizer):
        chosen = optimizer
    elif callable(optimizer):
        chosen = optimizer(params)
    elif optimizer is None and settings.optimizer is not None:
        chosen = optim.build(settings.optimizer.type, params, settings.optimizer.params)
    else:
        raise ConfigError(
            "initialize(optimizer=...): expected a torch.optim.Optimizer or a callable that makes "
            f"one of parameters, got {type(optimizer).__name__}"
        )
    _refuse_strangers(chosen, model)
    if has_stepped(chosen):
        raise PlanError(
            "the optimizer has state already, and its tensors are about to become shards: make it "
            "anew, and load state with engine.load_checkpoint; what its constructor itself makes "
            "may be zeros, or one number for all elements"
        )
    return Chosen(chosen)


def _refuse_empty(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise PlanError(
            f"the model, a {type(model).__name__}, has no parameters: nothing to train; for an "
            "engine that only runs forward give no optimizer"
        )


def _refuse_strangers(optimizer: Optimizer, model: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [tuple(p.shape) for p in held if id(p) not in own]
    if strange:
        raise PlanError(
            f"the optimizer holds parameters that are not the model's, {len(strange)} of "
            f"{len(held)}, of shapes {strange[:3]}: make it anew from the parameters of the very "
            "model that is given to initialize; one that an engine has had holds that engine's "
            "shards"
        )


def _abilities_of(optimizer: Optimizer, *, shards: bool) -> Abilities:
    name, can = type(optimizer).__name__, examine(optimizer)
    if can.never is not None:
        raise ConfigError(f"optimizer {name} is refused at every stage: {can.never}")
    if can.shards is not None and shards:
        raise ConfigError(
            f"optimizer {name} cannot run on shards: {can.shards}. Use zero_optimization.stage 0, "
            "which keeps the optimizer whole"
        )
    return can
