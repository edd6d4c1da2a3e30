"""This rank's fragment of a parameter's master, gradient or optimizer state. Mirrors
deepspeed.utils.safe_get_local_* and safe_set_local_*.

A fragment is a run (n,) of the parameter's elements in the order in which they lie in memory,
possibly empty: what is split among ranks are buckets, not parameters. At stage 0, and with the
owner of a whole parameter, it is the whole parameter; where parameters are exchanged its gradient
is in shards all the same. For a parameter of no engine a getter returns None and a setter does
nothing.

Those of masters and optimizer state are this rank's alone. All ranks call those of gradients
together, because sums may still be under way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zerort.errors import StepError
from zerort.memory import unintercepted
from zerort.utils.fields import GRADIENT, MASTER, Field, State
from zerort.utils.held import Held, held

__all__ = [
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
]


def safe_get_local_fp32_param(param: Any) -> Tensor | None:
    """The optimizer's copy (n,), fp32 or fp64. A copy of it."""
    return _read(held(param), MASTER)


def safe_get_local_grad(param: Any) -> Tensor | None:
    """The reduced gradient (n,) between backward and step, as `safe_get_full_grad` gives it; None
    while nothing has been reduced. All ranks call it.
    """
    mine = held(param)
    if mine is not None:
        mine.owner.together("safe_get_local_grad()", mine.name, lambda: None)
    return _read(mine, GRADIENT)


def safe_get_local_optimizer_state(param: Any, optim_state_key: str) -> Tensor | None:
    """The optimizer's state of that name (n,); None before the first step."""
    return _read(held(param), State(optim_state_key))


def safe_set_local_fp32_param(param: Any, value: Tensor) -> None:
    """Replaces the optimizer's copy by `value` (n,), and the parameter by the same in its own
    dtype: at stage 3 as soon as it is gathered, at stages 1 and 2 on this rank, and on the others
    behind the next step; where parameters are exchanged, behind the next step on all.

    Raises `StepError` for another number of elements.
    """
    _write(held(param), MASTER, value)


def safe_set_local_grad(param: Any, value: Tensor) -> None:
    """Replaces the reduced gradient by `value` (n,). All ranks call it."""
    mine = held(param)
    if mine is not None:
        mine.owner.together("safe_set_local_grad()", mine.name, lambda: None)
    _write(mine, GRADIENT, value)


def safe_set_local_optimizer_state(param: Any, value: Tensor, optim_state_key: str) -> None:
    """Replaces the optimizer's state of that name by `value` (n,)."""
    _write(held(param), State(optim_state_key), value)


@unintercepted
def _read(mine: Held | None, field: Field) -> Tensor | None:
    found = None if mine is None else field.read(mine)
    return None if found is None else found.clone()


@unintercepted
def _write(mine: Held | None, field: Field, value: Tensor) -> None:
    if mine is None:
        return
    lo, hi = field.place(mine).own
    if value.numel() != hi - lo:
        raise StepError(
            f"parameter {mine.name}: this rank's fragment has {hi - lo} elements, got "
            f"{value.numel()}"
        )
    with torch.no_grad():
        field.write(mine, value.detach().reshape(-1))
