"""Where an optimizer may run: on shards, on whole parameters only, or nowhere.

One that does not treat each element alone (Muon, LAMB, Adafactor) is wrong on a shard. One whose
step runs forward and backward by itself (LBFGS) cannot follow a gradient that has been summed over
ranks already.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerort.optim.lion import Lion

__all__ = ["why_never", "why_not_elementwise"]

_KNOWN = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    Lion,
)


def why_never(optimizer: Optimizer) -> str | None:
    """None when the optimizer may run at some stage, else the reason it may at none."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        return "it takes sparse gradients only, and gradients are reduced dense; use Adam"
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return (
            "its step needs a closure that repeats forward and backward, and engine.step() "
            "applies gradients that have been summed over ranks already; use an optimizer whose "
            "step() needs no closure, such as AdamW"
        )
    return None


def why_not_elementwise(optimizer: Optimizer) -> str | None:
    """None when the optimizer may run on shards, else the reason it may not.

    A class that is not on the list of known ones is probed: three steps over 256 elements must
    equal three steps over the two halves. A subclass of a known class may have changed `step`, so
    it is probed too.
    """
    if type(optimizer) in _KNOWN:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(256, generator=generator)
    gradients = [torch.randn(256, generator=generator) for _ in range(3)]
    try:
        whole = _run(optimizer, [start], [[gradient] for gradient in gradients])
        halves = _run(optimizer, start.chunk(2), [gradient.chunk(2) for gradient in gradients])
    except Exception as error:  # whatever it raises on a flat tensor is the answer
        return f"it cannot step on a flat tensor: {error}"
    if torch.allclose(whole, halves, rtol=1e-5, atol=1e-7):
        return None
    return (
        "three steps over 256 elements differ from the same steps over two halves of 128: "
        "it looks at whole tensors"
    )


def _run(
    optimizer: Optimizer, tensors: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> Tensor:
    params = [nn.Parameter(tensor.clone()) for tensor in tensors]
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": params}]
    for step in gradients:
        for parameter, gradient in zip(params, step, strict=True):
            parameter.grad = gradient.clone()
        twin.step()
    return torch.cat([parameter.detach() for parameter in params])
