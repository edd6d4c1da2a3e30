"""Modules under torch.compile: which are compiled whole, and what that costs.

A module compiled whole has one graph for its backward, and a graph hands its gradients over when it
is done: they all come at the end, so no bucket can leave while backward still runs. The result is
the same to the bit; only the overlap is lost. Compiled block by block, each block's gradients come
when the block's backward is over.

Nothing here compiles anything, and the names of a wrapper's parameters (`_orig_mod.`) are left as
torch makes them.
"""

from __future__ import annotations

from torch import nn

__all__ = ["ADVICE", "is_whole"]

ADVICE = (
    "the module is compiled whole, so all its gradients come at the end of the backward and no "
    "communication overlaps with it: compile its blocks instead, for example with block.compile() "
    "for each layer"
)

# by its name: importing torch._dynamo for its class would add a second to every start
_WRAPPED = "_orig_mod"


def is_whole(module: nn.Module) -> bool:
    """Whether `module` itself went through torch.compile(module) or module.compile(); its parts do
    not count.
    """
    return _WRAPPED in module._modules or module._compiled_call_impl is not None
