"""Which optimizer trains: the one that is given, or the configuration's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from zerort import optim
from zerort.config import Config
from zerort.errors import ConfigError, PlanError
from zerort.optim import has_stepped
from zerort.optim.elementwise import why_never

__all__ = ["choose_optimizer"]


def choose_optimizer(
    settings: Config, model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None
) -> Optimizer:
    """`optimizer` itself, what it makes of the parameters, or the configuration's.

    Raises `ConfigError` where there is none or no stage can run it, `PlanError` where it has state.
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
    reason = why_never(chosen)
    if reason is not None:
        raise ConfigError(f"optimizer {type(chosen).__name__} is refused at every stage: {reason}")
    if has_stepped(chosen):
        raise PlanError(
            "the optimizer has state already, and its tensors are about to become shards: make it "
            "anew, and load state with engine.load_checkpoint"
        )
    return chosen
