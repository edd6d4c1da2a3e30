"""Which optimizer trains: the one that is given, or the configuration's; or none does."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
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
    Chain,
    NoOptimizer,
    ShardOptimizer,
    Update,
    examine,
    has_stepped,
    members_of,
    name_of,
    schedules,
)

__all__ = ["Chosen", "choose_optimizer", "log_members"]

_log = logging.getLogger("zerort")


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

    def able(self, *, shards: bool) -> Sequence[Abilities]:
        """What each optimizer can be given that it is made of; `shards` says what the stage gives.

        Raises `ConfigError` where that is more than it can do.
        """
        every = () if self.optimizer is None else members_of(self.optimizer)
        return [_abilities_of(member, shards=shards) for member in every]

    def over(self, flat: FlatModel, abilities: Sequence[Abilities]) -> Update:
        """What updates the buckets."""
        if self.optimizer is None:
            return NoOptimizer(self.reason)
        return ShardOptimizer(self.optimizer, flat, abilities)

    def scheduler(self, settings: Config, given: Any) -> Any:
        """What moves its learning rates: `given`, what that makes of the optimizer, or the
        configuration's; None where there is none. Raises `ConfigError` where there is no optimizer.
        """
        if self.optimizer is None:
            if given is not None:
                raise ConfigError(
                    "initialize(lr_scheduler=...) without an optimizer: there are no learning "
                    "rates; give an optimizer that trains, or leave the scheduler out"
                )
            return None
        if given is not None:
            makes = isinstance(given, type) or not hasattr(given, "step")
            return given(self.optimizer) if makes else given
        if settings.scheduler is None:
            return None
        return schedules.build(settings.scheduler.type, settings.scheduler.params, self.optimizer)


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
    makes = callable(optimizer) and not isinstance(optimizer, Optimizer)
    given = optimizer(params) if makes else optimizer
    if isinstance(given, list | tuple):
        chosen = _chained(given)
    elif isinstance(given, Optimizer):
        chosen = given
    elif optimizer is None and settings.optimizer is not None:
        chosen = optim.build(settings.optimizer.type, params, settings.optimizer.params, model)
    else:
        raise ConfigError(
            "initialize(optimizer=...): expected a torch.optim.Optimizer or a callable that makes "
            "one of parameters, or a list of optimizers over different parameters, got "
            f"{type(given).__name__}"
        )
    if isinstance(given, Chain | list | tuple):
        _refuse_unshared(chosen, model)
    _refuse_strangers(chosen, model)
    if has_stepped(chosen):
        raise PlanError(
            "the optimizer has state already, and its tensors are about to become shards: make it "
            "anew, and load state with engine.load_checkpoint; what its constructor itself makes "
            "may be zeros, or one number for all elements"
        )
    return Chosen(chosen)


def _chained(optimizers: Sequence[Any]) -> Optimizer:
    """Several optimizers as one. Raises `ConfigError` for what is none."""
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise ConfigError(
                "initialize(optimizer=[...]): expected optimizers, each made over parameters of "
                f"its own, got {type(each).__name__}"
            )
    if not optimizers:
        raise ConfigError("initialize(optimizer=[]): expected at least one optimizer")
    return Chain(optimizers)


def _refuse_unshared(chain: Optimizer, model: nn.Module) -> None:
    """Raises `PlanError` naming a parameter that several optimizers have, or that requires grad and
    none has.
    """
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    holders: dict[int, str] = {}
    for member in members_of(chain):
        held = {id(p) for group in member.param_groups for p in group["params"]}
        for twice in held & holders.keys():
            raise PlanError(
                f"parameter {named.get(twice, '?')} is in two of the optimizers, "
                f"{holders[twice]} and {type(member).__name__}: give it to one"
            )
        holders.update(dict.fromkeys(held, type(member).__name__))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    left = [name for name, p in trained if id(p) not in holders]
    if left:
        raise PlanError(
            f"parameter {left[0]} requires grad and is in none of the optimizers, "
            f"{name_of(chain)}: give it to one, or freeze it with requires_grad_(False); there are "
            f"{len(left)} such parameters"
        )


def log_members(optimizer: Optimizer, flat: FlatModel) -> None:
    """Says which optimizer updates what, where there are several."""
    if not isinstance(optimizer, Chain):
        return
    first = 0
    for member in optimizer.members:
        groups = range(first, first + len(member.param_groups))
        first = groups.stop
        buckets = [bucket for bucket in flat.trained if bucket.group in groups]
        held = {p: name for b in buckets for p, name in zip(b.spec.params, b.names, strict=True)}
        names = [held[param] for param in sorted(held)]
        _log.info(
            "%s updates %d parameters of %d elements: %s%s",
            type(member).__name__,
            len(names),
            sum(sum(bucket.spec.numels) for bucket in buckets),
            ", ".join(names[:_NAMED]),
            f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "",
        )


_NAMED = 12
"""Names in a line of the log."""


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
    if can.across is not None and shards:
        raise ConfigError(
            f"optimizer {name} cannot run on shards: {can.across}. Use zero_optimization.stage 0, "
            "which keeps the optimizer whole"
        )
    return can
