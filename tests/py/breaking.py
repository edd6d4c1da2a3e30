"""Backwards that raise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models import Terms


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ctx.error


def raises_in_backward(x: Tensor, error: BaseException) -> Tensor:
    """The identity, whose backward raises the error."""
    return _Raises.apply(x, error)


class MayBreak(Terms):
    """`Terms` whose `a` raises in backward on demand, when `b` has its gradient already: what it is
    given, or an ArithmeticError for True.
    """

    def forward(self, a: float, b: float, breaks: bool | BaseException | None = None) -> Tensor:  # type: ignore[override]
        error = ArithmeticError("the user's own backward") if breaks is True else breaks
        first = raises_in_backward(self.a, error) if error else self.a
        return a * first.sum() + b * self.b.sum()
