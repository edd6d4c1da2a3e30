"""Functions whose activations are computed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as _torch_checkpoint

__all__ = ["checkpoint", "non_reentrant_checkpoint"]


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, whose backward runs it once more. Mirrors
    deepspeed.checkpointing.checkpoint.

    torch's reentrant kind: gradients flow where a tensor among the arguments, given by keyword or
    not, requires grad. What the function returns is returned as it is.
    """
    names = tuple(kwargs)
    if not names:
        return _torch_checkpoint(function, *args, use_reentrant=True)
    count = len(args)

    def positional(*given: Any) -> Any:
        return function(*given[:count], **dict(zip(names, given[count:], strict=True)))

    # torch's reentrant kind takes no keywords, and sees no tensor in a closure
    return _torch_checkpoint(positional, *args, *kwargs.values(), use_reentrant=True)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same by torch's other kind: gradients flow to parameters of the function's own too, where
    no argument requires grad.
    """
    return _torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
