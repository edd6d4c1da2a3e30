"""DeepSpeed's optimizers by name, over torch's fused ones and zerort's Lion.

They are no classes of their own: what `FusedAdam(...)` makes is `torch.optim.AdamW`, and an
instance of that is called an instance of `FusedAdam`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from zerort.optim import NAMED, Lion

__all__ = [
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "FusedAdam",
    "FusedLion",
]

_TORCHS = ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay")
"""What a group of another torch optimizer says of that one, not of what is made of it."""


class _Made(type):
    """Calls make an instance of another class."""

    kinds: tuple[type[Optimizer], ...] = ()
    make: Callable[..., Optimizer]

    def __call__(cls, params: Iterable[Any], *args: Any, **options: Any) -> Any:
        return cls.make(_plain(params), *args, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.kinds)


def _plain(params: Iterable[Any]) -> list[Any]:
    return [
        {key: value for key, value in group.items() if key not in _TORCHS}
        if isinstance(group, Mapping)
        else group
        for group in params
    ]


def _fused_adam(
    params: Iterable[Any],
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    adam_w_mode: bool = True,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    set_grad_none: bool = True,
) -> Optimizer:
    return NAMED["adam"](
        params,
        lr=lr,
        bias_correction=bias_correction,
        betas=betas,
        eps=eps,
        adam_w_mode=adam_w_mode,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
    )


def _cpu_adam(
    model_params: Iterable[Any],
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    adamw_mode: bool = True,
    fp32_optimizer_states: bool = True,
) -> Optimizer:
    return _fused_adam(
        model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad
    )


def _cpu_adagrad(
    model_params: Iterable[Any],
    lr: float = 1e-2,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    fp32_optimizer_states: bool = True,
) -> Optimizer:
    return NAMED["adagrad"](model_params, lr=lr, eps=eps, weight_decay=weight_decay)


def _lion(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    set_grad_none: bool = True,
    fp32_optimizer_states: bool = True,
) -> Optimizer:
    return Lion(params, lr=lr, betas=betas, weight_decay=weight_decay)


class FusedAdam(metaclass=_Made):
    """Adam, by default with decoupled weight decay, as torch's fused one."""

    kinds = (torch.optim.Adam, torch.optim.AdamW)
    make = staticmethod(_fused_adam)


class DeepSpeedCPUAdam(metaclass=_Made):
    """The same; where it runs is the configuration's affair (`offload_optimizer`)."""

    kinds = (torch.optim.Adam, torch.optim.AdamW)
    make = staticmethod(_cpu_adam)


class DeepSpeedCPUAdagrad(metaclass=_Made):
    """Adagrad as torch's fused one."""

    kinds = (torch.optim.Adagrad,)
    make = staticmethod(_cpu_adagrad)


class FusedLion(metaclass=_Made):
    """zerort's Lion."""

    kinds = (Lion,)
    make = staticmethod(_lion)


class DeepSpeedCPULion(FusedLion):
    """The same."""
