"""What a model must be before anything of it is moved: a module, with values to train, of dense
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from zerort.errors import ConfigError, PlanError
from zerort.memory import Present
from zerort.params.sharded import Gone, keeper_of
from zerort.zero.init import origin_of

__all__ = [
    "checked",
    "refuse_arguments",
    "refuse_unready",
    "settle_sparse",
]


def refuse_arguments(refused: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming the first argument that was given and has to be left out."""
    for name, value in refused.items():
        if value is not None:
            raise ConfigError(
                f"initialize({name}=...) is refused: model parallelism is not built yet; leave it "
                "out"
            )


def checked(model: Any) -> nn.Module:
    """`model` itself. Raises `ConfigError` for what is no module, or is wrapped in DDP already."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"initialize needs model=: a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ConfigError(
            f"initialize(model=...) is wrapped in {type(model).__name__}, which exchanges "
            "gradients itself: give the module inside, model.module"
        )
    return model


def refuse_unready(module: nn.Module) -> None:
    """Raises `PlanError` naming the first parameter that is lazy, on the meta device, or made for
    inference only, or the first buffer without values.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError(
            "initialize under torch.inference_mode(): what it made could not be trained; leave "
            "the context"
        )
    named = list(module.named_parameters())
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
        if isinstance(parameter, Gone):
            raise PlanError(
                f"parameter {name} has no values: they went with an engine of stage 3 that had "
                "broken off in the middle of an update; build the model anew, and load a "
                "checkpoint"
            )
        if keeper_of(parameter) is not None and isinstance(origin_of(parameter), Present):
            raise PlanError(
                f"parameter {name} belongs to an engine of stage 3 that is alive, and has its "
                "values in parts: build another model for another engine"
            )
        if parameter.is_inference():
            raise PlanError(
                f"parameter {name} was made under torch.inference_mode(): make the model outside "
                "of it"
            )
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise PlanError(
                f"buffer {name} is on the meta device and has no values: call "
                "model.to_empty(device=...) and fill it, then initialize"
            )


def settle_sparse(module: nn.Module, policy: Literal["refuse", "densify"]) -> None:
    """Looks for embeddings with sparse=True. Raises `PlanError` naming the first, or sets
    sparse=False.

    A dense gradient costs the embedding's full size in memory and on the wire, which is why it has
    to be asked for.
    """
    for name, part in module.named_modules():
        if not isinstance(part, nn.Embedding | nn.EmbeddingBag) or not part.sparse:
            continue
        if policy == "refuse":
            raise PlanError(
                f"module {name} has sparse=True, and flat buffers carry dense gradients only: set "
                'sparse=False, or configure "zerort": {"sparse_gradients": "densify"}'
            )
        part.sparse = False
