"""Models that have no values to train yet, refused before anything of them is moved."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from zerort.errors import PlanError

__all__ = ["refuse_unready"]


def refuse_unready(module: nn.Module) -> None:
    """Raises `PlanError` naming the first parameter that is lazy, on the meta device, or made for
    inference only.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError(
            "initialize under torch.inference_mode(): what it made could not be trained; leave "
            "the context"
        )
    named = list(module.named_parameters())
    if not named:
        raise PlanError(
            f"the model, a {type(module).__name__}, has no parameters: nothing to train"
        )
    for name, parameter in named:
        if is_lazy(parameter):
            raise PlanError(
                f"parameter {name} has no shape yet: run one forward of the lazy module before "
                "initialize"
            )
        if parameter.is_meta:
            raise PlanError(
                f"parameter {name} is on the meta device and has no values: call "
                "model.to_empty(device=...) and fill it, then initialize"
            )
        if parameter.is_inference():
            raise PlanError(
                f"parameter {name} was made under torch.inference_mode(): make the model outside "
                "of it"
            )
