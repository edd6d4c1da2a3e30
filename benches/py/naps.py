"""Layers that compute without a core: as on an accelerator, or on cores that nothing else needs.

Ranks of one machine share its cores with what sends and receives for them. A layer that sleeps as
long as it should compute leaves them to that, so that what is measured is the order of things.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Nap", "nap_behind"]


class Nap(torch.autograd.Function):
    """The identity, after so many seconds in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: float, behind: float) -> Tensor:
        ctx.behind = behind
        time.sleep(before)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.behind)
        return gradients[0], None, None


def nap_behind(module: nn.Module, forward: float, backward: float) -> None:
    """From now on `module` takes so many seconds more. Its gradients come when those of its
    backward are over.
    """
    module.register_forward_hook(lambda _, __, output: Nap.apply(output, forward, backward))
