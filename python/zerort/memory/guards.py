"""Memory that raises when it is read while nothing is in it, where torch can be asked for that.
What does it is private.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["guard", "guards", "unguard"]


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


def _reads(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
