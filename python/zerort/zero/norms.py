"""Batch norms: the modules that a mixed precision may leave in fp32 while it casts all others."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["is_affine_batch_norm"]


def is_affine_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is a batch norm with weights, of any number of dimensions, synchronised or
    not. One without weights takes the dtype of its input, as Apex has it.
    """
    return isinstance(module, _BatchNorm) and module.affine
