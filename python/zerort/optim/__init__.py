"""Optimizers: any `torch.optim.Optimizer` that treats each element alone works on a shard, and one
that looks at whole parameters where they lie whole.

A configured name is looked up in `NAMED`, then among torch.optim's classes. To add one: a file here
and a row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zerort.errors import ConfigError
from zerort.optim.chain import Chain, members_of, name_of
from zerort.optim.initial import has_stepped
from zerort.optim.lion import Lion
from zerort.optim.muon import muon
from zerort.optim.nothing import ALL_FROZEN, NONE_GIVEN, NoOptimizer
from zerort.optim.probe import Abilities, examine, is_known
from zerort.optim.shard import ShardOptimizer

__all__ = [
    "ALL_FROZEN",
    "NAMED",
    "NONE_GIVEN",
    "Abilities",
    "Chain",
    "Lion",
    "NoOptimizer",
    "ShardOptimizer",
    "Update",
    "build",
    "examine",
    "has_stepped",
    "is_known",
    "members_of",
    "name_of",
]

Params = Iterable[Any]

Update = ShardOptimizer | NoOptimizer
"""What an engine updates its parameters with, if it does."""


def _adam(*, decoupled: bool) -> Callable[..., Optimizer]:
    """DeepSpeed's Adam and AdamW, with the parameters of its FusedAdam.

    Adam's decay is decoupled unless `adam_w_mode` is false, AdamW's always; without `torch_adam`,
    which asks for torch's own, the decay left out is 0.
    """

    @functools.wraps(torch.optim.AdamW, updated=())
    def construct(params: Params, **options: Any) -> Optimizer:
        if not _switch(options, "bias_correction", True):
            raise ConfigError(
                "optimizer.params.bias_correction: expected true, got false: torch's Adam always "
                "corrects"
            )
        apart = _switch(options, "adam_w_mode", True) or decoupled
        options.pop("set_grad_none", None)  # gradients are the engine's
        if not _switch(options, "torch_adam", False):
            options.setdefault("weight_decay", 0.0)
        return _fused(torch.optim.AdamW if apart else torch.optim.Adam)(params, **options)

    return construct


def _cpu_adam(params: Params, **options: Any) -> Optimizer:
    """DeepSpeed's Adam for the CPU: the same with a spelling of its own. What its state is kept in
    is decided with the masters', by the configuration.
    """
    _switch(options, "fp32_optimizer_states", True)
    decoupled = _switch(options, "adamw_mode", True)
    return _adam(decoupled=False)(params, **{"adam_w_mode": decoupled, **options})


def _switch(options: dict[str, Any], name: str, default: bool) -> bool:
    value = options.pop(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"optimizer.params.{name}: expected true or false, got {value!r}")
    return value


@functools.cache
def _fused_sgd_updates_16_bits() -> bool:
    """Not on the CPU in torch 2.6, where it leaves them as they are."""
    parameter = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=1.0, fused=True).step()
    return bool((parameter == -1).all())


def _fused(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    @functools.wraps(kind, updated=())  # so that the signature, which messages show, is the class's
    def construct(params: Params, **options: Any) -> Optimizer:
        if not {"fused", "foreach", "differentiable"} & options.keys():
            options["fused"] = kind is not torch.optim.SGD or _fused_sgd_updates_16_bits()
        return kind(params, **options)

    return construct


NAMED: dict[str, Callable[..., Optimizer]] = {
    "adam": _adam(decoupled=False),
    "adamw": _adam(decoupled=True),
    "fusedadam": _adam(decoupled=False),
    "cpuadam": functools.wraps(torch.optim.AdamW, updated=())(_cpu_adam),
    "deepspeedcpuadam": functools.wraps(torch.optim.AdamW, updated=())(_cpu_adam),
    "sgd": _fused(torch.optim.SGD),
    "adagrad": _fused(torch.optim.Adagrad),
    "lion": Lion,
    "fusedlion": Lion,
    "muon": muon,
}

_NEVER = ("LBFGS", "SparseAdam")
"""Refused at every stage, so no guess at what was meant."""


def build(name: str, params: Params, options: dict[str, Any], model: nn.Module) -> Optimizer:
    """The optimizer that a configuration names, over `params` of `model` (tensors or group dicts).

    Raises `ConfigError` for an unknown name or option.
    """
    classes = {
        key: kind
        for key, kind in vars(torch.optim).items()
        if isinstance(kind, type) and kind is not Optimizer
    }
    construct = NAMED.get(name.lower()) or classes.get(name)
    if construct is None:
        known = [*NAMED, *(key for key in classes if key not in _NEVER)]
        near = get_close_matches(name, known, 1) or get_close_matches(name.lower(), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"optimizer.type: {name!r} is no optimizer known here or in torch.optim{hint}"
        )
    knows = {"model": model} if "model" in inspect.signature(construct).parameters else {}
    try:
        return construct(params, **options, **knows)
    except ConfigError:
        raise
    except Exception as error:  # of any kind: the values come from a file
        takes = [
            key
            for key in inspect.signature(construct).parameters
            if key not in ("params", "options", "model")
        ]
        hint = f"; it takes {', '.join(takes)}" if isinstance(error, TypeError) else ""
        raise ConfigError(
            f"optimizer.params: {name} cannot be built with {options}: "
            f"{str(error) or type(error).__name__}{hint}"
        ) from error
