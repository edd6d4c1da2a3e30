"""A parameter's master, gradient or optimizer state, whole on every rank. Mirrors
deepspeed.utils.safe_get_full_* and safe_set_full_*.

All ranks make these calls together, outside forward and backward; where one cannot, all raise
`StepError`. For a parameter that no engine has planned (one outside the optimizer, or of an engine
that has been destroyed) a getter returns None and a setter does nothing, without communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zerort.errors import StepError
from zerort.memory import unintercepted
from zerort.utils.fields import GRADIENT, MASTER, Field, State
from zerort.utils.held import Held, held

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_update_full_grad_vectorized",
]


def safe_get_full_fp32_param(param: Any) -> Tensor | None:
    """The optimizer's copy of a parameter, in the parameter's shape: fp32, or fp64 where it is
    fp64 itself. A copy: writing to it changes nothing. None for a parameter of no engine.
    """
    return _read("safe_get_full_fp32_param()", param, MASTER)


def safe_set_full_fp32_param(param: Any, value: Tensor) -> None:
    """Replaces the optimizer's copy by `value`, of the parameter's shape and any dtype, and the
    parameter by the same in its own dtype. Each rank's shard is taken from its own `value`.

    Raises `StepError` for another number of elements.
    """
    mine = held(param)
    if mine is not None:
        _write("safe_set_full_fp32_param()", mine, MASTER, value)
        _publish(mine)


def safe_get_full_grad(param: Any) -> Tensor | None:
    """The gradient that the next step will apply, in the parameter's shape and the dtype in which
    gradients are added up: the mean over ranks and accumulation steps, before clipping, in fp16
    still times `engine.loss_scale`.

    Between backward and step. Before a window's first reduction (within `no_sync`, in a micro-batch
    whose gradients wait for the boundary's) it is what waits on this rank: the sum of its
    micro-batches, over the accumulation steps as `backward` divides. None where there is none, for
    a frozen parameter, and for one of no engine. A copy.
    """
    mine = held(param)
    if mine is None or mine.owner.has_sums:
        return _read("safe_get_full_grad()", param, GRADIENT)
    mine.owner.together("safe_get_full_grad()", mine.name, _nothing)
    return mine.local_gradient


def safe_set_full_grad(param: Any, value: Tensor) -> None:
    """Replaces that gradient by `value`, of the parameter's shape and any dtype, and with it the
    norm that the step clips by.

    Raises `StepError` where there is no gradient, and for another number of elements.
    """
    mine = held(param)
    if mine is None:
        return
    if mine.owner.has_sums:
        _write("safe_set_full_grad()", mine, GRADIENT, value)
        return
    mine.owner.together("safe_set_full_grad()", mine.name, lambda: mine.write_local_gradient(value))


def safe_update_full_grad_vectorized(
    param_list: Iterable[Any], update_func: Callable[[Tensor, Any], Tensor]
) -> None:
    """Replaces the gradient of each parameter that has one by `update_func(gradient, parameter)`.

    One parameter at a time is whole.
    """
    for param in param_list:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))


def safe_get_full_optimizer_state(param: Any, optim_state_key: str) -> Tensor | None:
    """The optimizer's state of that name (`exp_avg` and `exp_avg_sq` of Adam), in the parameter's
    shape. A copy. None before the first step, for a frozen parameter, and for one of no engine.

    Raises `StepError` for a name that the optimizer has not, or that is not of the parameter's
    shape.
    """
    return _read(
        f"safe_get_full_optimizer_state({optim_state_key!r})", param, State(optim_state_key)
    )


def safe_set_full_optimizer_state(param: Any, value: Tensor, optim_state_key: str) -> None:
    """Replaces it by `value`, of the parameter's shape and any dtype.

    Raises `StepError` where there is none, and for another number of elements.
    """
    mine = held(param)
    if mine is not None:
        what = f"safe_set_full_optimizer_state({optim_state_key!r})"
        _write(what, mine, State(optim_state_key), value)


@unintercepted
def _read(call: str, param: Any, field: Field) -> Tensor | None:
    mine = held(param)
    if mine is None:
        return None
    own: list[Tensor | None] = []
    place = field.place(mine)

    def attempt() -> torch.dtype | None:
        own.append(field.read(mine))
        lo, hi = place.own
        return None if own[0] is None or lo == hi else own[0].dtype

    dtypes = {dtype for dtype in mine.owner.together(call, mine.name, attempt) if dtype is not None}
    fragment = own[0]
    if not dtypes:  # no rank has any, or the parameter has no element
        return None if fragment is None or mine.numel else mine.form.over(fragment.clone())
    if fragment is None or place.own[0] == place.own[1]:
        (dtype,) = dtypes
        fragment = torch.empty(0, dtype=dtype, device=mine.bucket.master.device)
    return mine.whole(place, fragment)


@unintercepted
def _write(call: str, mine: Held, field: Field, value: Tensor) -> None:
    def check() -> Tensor:
        if value.numel() != mine.numel:
            raise StepError(
                f"{call} of parameter {mine.name}: expected {mine.numel} elements, of shape "
                f"{mine.form.shape}, got {value.numel()}"
            )
        field.read(mine)
        return field.place(mine).cut(value.detach())

    fragments: list[Tensor] = []
    mine.owner.together(call, mine.name, lambda: fragments.append(check()))
    with torch.no_grad():
        mine.owner.alike(call, lambda: field.write(mine, fragments[0]))


@unintercepted
def _publish(mine: Held) -> None:
    """Every rank that has the parameter whole has the new values."""
    place = mine.kept
    with torch.no_grad():
        place.bucket.ready()
        mine.replace(mine.whole(place, place.fragment(place.bucket.master).to(mine.dtype)))


def _nothing() -> None:
    """Ranks only meet."""
