"""A decorator that marks a function's calls on a device's timeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from zerort.device.markers import default_markers
from zerort.trace.nvtx import marked

__all__ = ["instrument_w_nvtx"]

P = ParamSpec("P")
T = TypeVar("T")


def instrument_w_nvtx(func: Callable[P, T]) -> Callable[P, T]:
    """`func`, each of whose calls is an NVTX range of its qualified name, also where it raises.
    Mirrors deepspeed.utils.instrument_w_nvtx.

    Without CUDA, and while torch compiles, it is `func` alone.
    """

    @wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        markers = None if torch.compiler.is_compiling() else default_markers()
        if markers is None:
            return func(*args, **kwargs)
        with marked(func.__qualname__, markers.push, markers.pop):
            return func(*args, **kwargs)

    return call
