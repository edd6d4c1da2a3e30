"""Past a parameter's own `__torch_function__`.

A parameter's class may catch what is done with it: a subclass of the user's, or a parameter whose
values are elsewhere. What the engine asks of parameters at every step (`.grad`, `requires_grad`,
hooks, addresses) is bookkeeping that no such class should see, and each question would cost two
microseconds. So what reads parameters at a step does it within `unintercepted`, once for all.

What it must not surround is code of the user's: a forward, a backward's own functions and hooks, an
optimizer's step. There the class is to be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["undisturbed", "unintercepted", "version_of"]

P = ParamSpec("P")
T = TypeVar("T")


version_of = torch.Tensor._version.__get__  # type: ignore[attr-defined]
"""A tensor's version: it moves with each write that torch sees."""


def unintercepted(call: Callable[P, T]) -> Callable[P, T]:
    """`call`, within which operations on tensors of any class are torch's own."""

    @wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C.DisableTorchFunctionSubclass():
            return call(*args, **kwargs)

    return guarded


def undisturbed(call: Callable[P, T]) -> Callable[P, T]:
    """`unintercepted`, and outside `torch.inference_mode`, whose tensors cannot be trained with."""

    @wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C.DisableTorchFunctionSubclass():
            if not torch.is_inference_mode_enabled():
                return call(*args, **kwargs)
            with torch.inference_mode(False):
                return call(*args, **kwargs)

    return guarded
