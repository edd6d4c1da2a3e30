"""Learning-rate schedules by name: DeepSpeed's five, with its parameters and formulas, and any of
torch's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zerort.errors import ConfigError, did_you_mean, nearest
from zerort.optim.cycles import LRRangeTest, OneCycle
from zerort.optim.schedule import HasGroups
from zerort.optim.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["build"]

_SCHEDULES: Mapping[str, Callable[..., Any]] = {
    schedule.__name__: schedule
    for schedule in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def build(name: str, params: Mapping[str, Any], optimizer: HasGroups) -> Any:
    """The schedule `name` over `optimizer`: one of this module's, else one of
    `torch.optim.lr_scheduler`.

    Raises `ConfigError` for an unknown name or parameter, with the nearest known one, and for
    values that the schedule does not take.
    """
    known = {**_torch_schedules(), **_SCHEDULES}
    if name not in known:
        raise ConfigError(
            f'scheduler.type: unknown schedule "{name}"{did_you_mean(nearest(name, known))}'
        )
    schedule = known[name]
    signature = inspect.signature(schedule)
    for key in params:
        if key not in signature.parameters or key == "optimizer":
            names = [parameter for parameter in signature.parameters if parameter != "optimizer"]
            guess = did_you_mean(nearest(key, names))
            raise ConfigError(f"scheduler.params.{key}: no parameter of {name}{guess}")
    try:
        made = schedule(optimizer, **params)
    except ConfigError:
        raise
    except Exception as error:  # of any kind: the values come from a file
        raise ConfigError(
            f"scheduler.params: {name} does not take them: {str(error) or type(error).__name__}"
        ) from error
    for index, group in enumerate(optimizer.param_groups):
        if not 0 <= float(group["lr"]) < math.inf:
            raise ConfigError(
                f"scheduler.params: {name} gives group {index} of the optimizer the learning rate "
                f"{float(group['lr'])}"
            )
    return made


def _torch_schedules() -> dict[str, Callable[..., Any]]:
    module = torch.optim.lr_scheduler
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, module.LRScheduler)
        and name in module.__all__
        and value is not module.LRScheduler
    }
