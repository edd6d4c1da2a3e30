"""Marks on a device's timeline: what Nsight and its kin show as named ranges."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["Markers", "default_markers", "markers_of"]


class Markers(NamedTuple):
    """How a range begins and ends, on the calling thread; ranges nest."""

    push: Callable[[str], object]
    pop: Callable[[], object]


def markers_of(device: torch.device) -> Markers | None:
    """Those of CUDA, NVTX; None for other devices, and where torch was built without."""
    if device.type != "cuda":
        return None
    nvtx = torch.cuda.nvtx
    try:
        nvtx.range_push("zerort")  # type: ignore[no-untyped-call]
        nvtx.range_pop()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return Markers(nvtx.range_push, nvtx.range_pop)


@lru_cache(1)
def default_markers() -> Markers | None:
    """Of the device that models go to on this machine."""
    return markers_of(torch.device("cuda")) if torch.cuda.is_available() else None
