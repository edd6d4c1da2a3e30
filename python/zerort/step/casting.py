"""What a configured precision casts, and what is said when an operation meets two dtypes.

Cast are parameters, and those buffers that a kernel takes together with a parameter or an
activation and wants in the same dtype: the buffers of torch's own layers (running statistics, the
vectors of a spectral norm, a loss's class weights) and of any module with running statistics. Other
buffers belong to the model's author, who may rely on their precision, as a rotary table does: they
keep the dtype they have.

A mode that keeps batch norms leaves them out, statistics included: their kernels take an input of
another dtype than their parameters, and compute in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from zerort.memory import DTYPES
from zerort.step.mode import Mode
from zerort.zero.init import cast_born
from zerort.zero.norms import is_affine_batch_norm

__all__ = ["cast", "cast_buffers", "explained"]

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Their buffers are the author's."""

_STATISTICS = frozenset({"running_mean", "running_var"})

_ABOUT_TYPES = ("dtype", "scalar type", "should be the same")
"""What torch's errors say of two tensors of different types: of a product, of a normalisation, of a
convolution.
"""


def cast(module: nn.Module, dtype: torch.dtype, *, keeps_norms: bool = False) -> None:
    """Casts in place. Parameters that are no numbers to compute with stay as they are: integers,
    and floats of 8 bits, which are codes of something.
    """
    kept = _of_norms(module) if keeps_norms else set()
    for parameter in module.parameters():
        if id(parameter) in kept or parameter.dtype not in DTYPES:
            continue
        if not cast_born(parameter, dtype):
            parameter.data = parameter.data.to(dtype)
    for part in module.modules():
        if _is_of_one_dtype(part):
            for buffer in part._buffers.values():
                if buffer is not None and buffer.dtype in DTYPES and id(buffer) not in kept:
                    buffer.data = buffer.data.to(dtype)


def cast_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts every floating-point buffer in place."""
    for buffer in module.buffers():
        if buffer.dtype in DTYPES:
            buffer.data = buffer.data.to(dtype)


def _of_norms(module: nn.Module) -> set[int]:
    """By id, the tensors of batch norms."""
    norms = [part for part in module.modules() if is_affine_batch_norm(part)]
    return {
        id(tensor)
        for norm in norms
        for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False))
    }


def _is_of_one_dtype(module: nn.Module) -> bool:
    kind = type(module)
    of_torch = kind.__module__.startswith("torch.nn.") and kind not in _CONTAINERS
    return of_torch or module._buffers.keys() >= _STATISTICS


@contextmanager
def explained(
    module: nn.Module, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Within, an error about types gets a note (from Python 3.11 on): what is not of the dtype that
    parameters are cast to.
    """
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in _ABOUT_TYPES) and hasattr(error, "add_note"):
            error.add_note(_note(module, mode, (args, dict(kwargs))))
        raise


def _note(module: nn.Module, mode: Mode, arguments: Any) -> str:
    dtype = mode.compute
    kept = _of_norms(module) if mode.keeps_norms else set()
    named = [(_argument(path), leaf) for path, leaf in tree_flatten_with_path(arguments)[0]]
    inputs = _others(dtype, named)
    tensors = (*module.named_parameters(), *module.named_buffers())
    held = _others(dtype, [(name, tensor) for name, tensor in tensors if id(tensor) not in kept])
    reasons = [f"zerort: the configuration casts parameters to {dtype}."]
    if inputs:
        reasons.append(
            f"Of another dtype are the inputs {inputs}: cast floating-point inputs with "
            f".to({dtype}), or use torch_autocast (for fp16 also fp16.auto_cast)."
        )
    if held:
        reasons.append(
            f"Of another dtype in the module are {held}: cast what meets an activation before "
            "zerort.initialize, which leaves the author's buffers in the dtype they have."
        )
    if len(reasons) == 1:
        reasons.append(
            "So are all inputs and buffers: look for a tensor that the forward itself makes, and "
            "give it the dtype of its neighbour."
        )
    return " ".join(reasons)


def _argument(path: tuple[Any, ...]) -> str:
    """The first element says whether it was given by position or by name."""
    return ("args" if path[0].idx == 0 else "kwargs") + keystr(path[1:])


def _others(dtype: torch.dtype | None, named: Any) -> str:
    found = [
        f"{name} ({tensor.dtype})"
        for name, tensor in named
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != dtype
    ]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
