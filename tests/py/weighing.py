"""Bytes under every tensor of this process."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterable

from torch import Tensor, UntypedStorage


def covered(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory under these tensors, each byte once, whatever looks at it."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    # one without bytes may not tell where it is
    spans = sorted((s.data_ptr(), s.nbytes()) for s in storages if s.nbytes())
    total = end = 0
    for start, size in spans:
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def shared() -> list[range]:
    """Where this process maps memory that the ranks of a job share."""
    with open("/proc/self/maps") as maps:
        rows = [row.split()[0] for row in maps if "memfd:zerort" in row]
    return [range(*(int(end, 16) for end in row.split("-"))) for row in rows]


def private(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that do not lie there."""
    spans = shared()

    def lies_there(storage: UntypedStorage) -> bool:
        # one without bytes may not tell where it is
        return bool(storage.nbytes()) and any(storage.data_ptr() in span for span in spans)

    return [tensor for tensor in tensors if not lies_there(tensor.untyped_storage())]


def reserved(world: int) -> int:
    """Bytes of that memory which one of so many ranks has brought."""
    return sum(map(len, shared())) // world


def alive() -> list[Tensor]:
    """Every tensor made since `gc.freeze` that Python can reach, and the gradients that only a
    parameter holds.
    """
    time.sleep(0.05)  # gloo's workers let go of their last collective a moment after it is complete
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        found = [
            thing
            for thing in gc.get_objects()
            if isinstance(thing, Tensor) and thing.device.type == "cpu"
        ]
    return found + [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
