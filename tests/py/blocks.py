"""An optimizer whose state is 8 bits an element and a scale a block, as such are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 64


class BlockState(Optimizer):
    """Sums of gradients, in blocks of `BLOCK` elements from a parameter's start; whole in tensors
    of less than `least` elements.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.05, least: int = 4096) -> None:
        super().__init__(params, {"lr": lr})
        self.least = least

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._update(parameter, group["lr"])

    def _update(self, parameter: Tensor, lr: float) -> None:
        state = self.state[parameter]
        if parameter.numel() < self.least:
            mean = state.setdefault("mean", torch.zeros_like(parameter))
            mean.lerp_(parameter.grad, 0.5)
        else:
            if not state:
                state["codes"] = torch.zeros_like(parameter, dtype=torch.int8)
                state["scales"] = torch.zeros(-(-parameter.numel() // BLOCK), 1)
            mean = _wide(state["codes"], state["scales"]).lerp(parameter.grad, 0.5)
            flat = torch.zeros(state["scales"].numel() * BLOCK)
            flat[: mean.numel()] = mean.reshape(-1)
            blocks = flat.view(-1, BLOCK)
            state["scales"].copy_(blocks.abs().amax(1, keepdim=True).clamp(min=1e-12))
            codes = (blocks / state["scales"] * 127).round().to(torch.int8)
            state["codes"].copy_(codes.view(-1)[: mean.numel()].view(mean.shape))
            mean = _wide(state["codes"], state["scales"])
        parameter.sub_(mean, alpha=lr)


def _wide(codes: Tensor, scales: Tensor) -> Tensor:
    flat = codes.reshape(-1).float() / 127
    return (flat * scales.expand(-1, BLOCK).reshape(-1)[: flat.numel()]).view(codes.shape)
