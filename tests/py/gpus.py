"""What tests on a GPU have in common: why they are skipped, and work that is late on purpose."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn

from zerort.device.accelerator import AcceleratorStreams
from zerort.mesh.nccl import NcclComm

__all__ = ["gpu", "late", "nccl"]


def _why_no_nccl() -> str | None:
    """What keeps two ranks from talking over NCCL here."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and to be asked for by `-m gpu`"
    # torch's own answer is the version that it was built with; another may be loaded.
    shared = torch.cuda.nccl.version() >= (2, 30) or "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ
    return (
        None
        if torch.cuda.device_count() >= 2 or shared
        else "needs two GPUs, or NCCL 2.30 to share one"
    )


def _marked(reason: str | None) -> Callable[[Any], Any]:
    def mark(test: Any) -> Any:
        return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))

    return mark


gpu = _marked(
    None if torch.cuda.is_available() else "needs a CUDA device, and to be asked for by `-m gpu`"
)
nccl = _marked(_why_no_nccl())


@contextmanager
def late(seed: int) -> Iterator[None]:
    """Within, streams stand still for up to a tenth of a millisecond at every place where work of
    zerort's is enqueued, and before every layer: the host runs far ahead, and what one stream does
    is far behind what another does.
    """
    draw = random.Random(seed)

    def stall() -> None:
        if draw.random() < 0.5:
            torch.cuda._sleep(draw.randrange(200_000))

    def behind(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def stalled(*args: Any, **kwargs: Any) -> Any:
            stall()
            result = call(*args, **kwargs)
            return _stalled_within(result, stall) if hasattr(result, "__enter__") else result

        return stalled

    places: list[tuple[Any, str]] = [
        *((AcceleratorStreams, name) for name in ("make_room", "packing", "summing", "join")),
        *((NcclComm, name) for name in ("reduce_scatter", "all_gather", "broadcast")),
    ]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: stall())
    for place, name, call in kept:
        setattr(place, name, behind(call))
    try:
        yield
    finally:
        handle.remove()
        for place, name, call in kept:
            setattr(place, name, call)


@contextmanager
def _stalled_within(context: Any, stall: Callable[[], None]) -> Iterator[Any]:
    with context as value:
        stall()
        yield value
        stall()
