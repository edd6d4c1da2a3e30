"""What torch's functions want of a tensor: its values, or what is known without them.

A function is known by its name, and one that is not known reads values.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Access", "access_of"]


class Access(Enum):
    """What a torch function wants of a parameter."""

    METADATA = auto()
    GRAPH = auto()
    """A place in the graph: a backward up to it."""
    DETACH = auto()
    """The values without their history, which a state dict asks for."""
    READ = auto()
    WRITE = auto()
    ESCAPE = auto()
    """The values in a form that torch does not see any more."""


_VALUES = frozenset({"T", "H", "mT", "mH", "real", "imag"})
_METADATA = frozenset(
    """
    __dir__ __format__ __hash__ __len__ _is_view _is_zerotensor can_cast dim element_size empty_like
    full_like get_device has_names is_complex is_conj is_contiguous is_distributed is_floating_point
    is_inference is_neg is_same_size is_signed is_tensor ndimension nelement
    new_empty new_empty_strided new_full new_ones new_tensor new_zeros numel ones_like rand_like
    randint_like randn_like register_hook register_post_accumulate_grad_hook requires_grad_
    result_type retain_grad size sparse_dim storage_offset stride untyped_storage zeros_like
    """.split()  # noqa: SIM905
)
_ESCAPES = frozenset(
    """
    __array__ __array_wrap__ __dlpack__ __dlpack_device__ _typed_storage data_ptr numpy resize_
    resize_as_ set_ share_memory_ storage to_dlpack tolist
    """.split()  # noqa: SIM905
)


_AUGMENTED = frozenset(
    """
    __iadd__ __iand__ __ifloordiv__ __imatmul__ __imod__ __imul__ __ior__ __ipow__ __isub__
    __itruediv__ __ixor__ __setitem__
    """.split()  # noqa: SIM905
)


@lru_cache(maxsize=4096)
def access_of(func: Callable[..., Any]) -> Access:
    """What `func` is, by its name; one that is not known reads."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return _to_attribute(getattr(getattr(func, "__self__", None), "__name__", ""), name)
    if name in _METADATA:
        return Access.METADATA
    if name in _ESCAPES:
        return Access.ESCAPE
    if name in ("detach", "detach_"):
        return Access.DETACH
    if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
        return Access.GRAPH
    in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("_foreach_"))
    return Access.WRITE if in_place or name in _AUGMENTED else Access.READ


def _to_attribute(attribute: str, how: str) -> Access:
    if attribute == "data":
        return Access.DETACH if how == "__get__" else Access.WRITE
    if attribute == "__cuda_array_interface__":
        return Access.ESCAPE
    return Access.READ if attribute in _VALUES else Access.METADATA
