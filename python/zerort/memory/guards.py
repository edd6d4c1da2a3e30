"""Memory that raises when it is read while nothing is in it, and how many have views of memory,
where torch can be asked for that. What does it is private.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["guard", "guards", "has_aliases", "unguard"]

_count = getattr(torch._C, "_storage_Use_Count", None)


def guard(storage: torch.UntypedStorage, contents: str) -> None:
    """From now on a kernel that reads the storage raises `RuntimeError`, naming `contents`."""
    message = (
        f"the values of {contents} are sharded, and something reads the memory in which "
        "they were whole. In a backward: the loss comes from a tensor inside a module that is "
        "not among its outputs; return it from the module's forward, and begin the backward "
        "with engine.backward(loss). Elsewhere: an alias that was taken while they were whole; "
        "use it inside zerort.zero.GatheredParameters(parameters)"
    )
    torch._C._set_storage_data_ptr_access_error_msg(storage._cdata, message)


def unguard(storage: torch.UntypedStorage) -> None:
    """It does not any more."""
    torch._C._clear_storage_data_ptr_access_error_msg(storage._cdata)


@cache
def guards() -> bool:
    """Whether torch can do that, and the guard changes places with the memory."""
    names = "_set_storage_data_ptr_access_error_msg", "_clear_storage_data_ptr_access_error_msg"
    if not all(hasattr(torch._C, name) for name in names):
        return False
    if not hasattr(torch.UntypedStorage, "_swap_data_ptr_"):
        return False
    guarded, other = torch.empty(1), torch.empty(1)
    torch._C._set_storage_data_ptr_access_error_msg(guarded.untyped_storage()._cdata, "guarded")
    guarded.untyped_storage()._swap_data_ptr_(other.untyped_storage())  # type: ignore[attr-defined]
    return _reads(guarded) and not _reads(other)


def has_aliases(storages: Sequence[int], tensors: int) -> list[int]:
    """Which of `storages`, by their `_cdata`, more than so many `tensors` have; all where torch
    does not tell. Each is alive, and has been asked for as an `UntypedStorage`.
    """
    if _count is None:
        return list(range(len(storages)))
    most = tensors + _of_object()
    counts = list(map(_count, storages))
    if not counts or max(counts) <= most:
        return []
    return [place for place, count in enumerate(counts) if count > most]


@cache
def _of_object() -> int:
    """How many uses the storage as Python's object is, which is kept once it has been made."""
    tensor = torch.empty(1)
    number = tensor.untyped_storage()._cdata
    assert _count is not None
    return int(_count(number)) - 1


def _reads(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
