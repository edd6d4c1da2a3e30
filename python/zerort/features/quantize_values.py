"""What a tensor's values are in few bits: the arithmetic of quantized training, and nothing else.

`quantized` is a pure function of its arguments. Values are grouped in the order of their indices,
`groups` runs of equal length, and each group has a scale of its own:

    bits >= 3   symmetric    s = 2 max|x| / R     q = s clamp(round(x / s + u), -R/2, R/2 - 1)
                asymmetric   s = (max - min) / R  q = s clamp(round((x - z) / s + u), 0, R - 1) + z
    bits = 2    m = mean|x|, a = mean of |x| over |x| > 0.7 m; +-a there, else 0
    bits = 1    sign(x) mean|x|

with R = 2^bits and z = s round(min / s). Halves are rounded to even; u is 0, or uniform in
[-1/2, 1/2] so that the mean over many roundings is x. A group whose scale is 0 stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantized"]


def quantized(
    values: Tensor,
    bits: int,
    *,
    groups: int = 1,
    symmetric: bool = True,
    noise: torch.Generator | None = None,
) -> Tensor:
    """`values` in 2^bits levels a group: a new tensor of their shape and dtype. `noise`, on the
    CPU, makes the rounding stochastic.

    Raises `ValueError` where `groups` do not divide the number of values, and below 3 bits for
    what is not symmetric or not rounded to nearest.
    """
    if not values.numel():
        return values.clone()
    if values.numel() % groups:
        raise ValueError(f"{values.numel()} values do not make {groups} groups of equal length")
    if bits < 3 and (noise is not None or not symmetric):
        raise ValueError(f"{bits} bits are symmetric, and rounded to nearest")
    rows = values.reshape(groups, -1).float()
    if bits == 1:
        found = _binary(rows)
    elif bits == 2:
        found = _ternary(rows)
    else:
        shift = _shift(rows, noise)
        found = (_symmetric if symmetric else _asymmetric)(rows, 2.0**bits, shift)
    return found.reshape(values.shape).to(values.dtype)


def _shift(rows: Tensor, noise: torch.Generator | None) -> Tensor | float:
    if noise is None:
        return 0.0
    return (torch.rand(rows.shape, generator=noise) - 0.5).to(rows.device)


def _symmetric(rows: Tensor, levels: float, shift: Tensor | float) -> Tensor:
    scale = 2 * rows.abs().amax(dim=1, keepdim=True) / levels
    codes = (rows / scale + shift).round().clamp(-levels / 2, levels / 2 - 1)
    return torch.where(scale == 0, rows, codes * scale)


def _asymmetric(rows: Tensor, levels: float, shift: Tensor | float) -> Tensor:
    lowest = rows.amin(dim=1, keepdim=True)
    scale = (rows.amax(dim=1, keepdim=True) - lowest) / levels
    zero = (lowest / scale).round() * scale
    codes = ((rows - zero) / scale + shift).round().clamp(0, levels - 1)
    return torch.where(scale == 0, rows, codes * scale + zero)


def _ternary(rows: Tensor) -> Tensor:
    sizes = rows.abs()
    large = sizes > 0.7 * sizes.mean(dim=1, keepdim=True)
    # all zero: none is large, and there is nothing to take the mean of
    count = large.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (sizes * large).sum(dim=1, keepdim=True) / count
    return rows.sign() * large * mean


def _binary(rows: Tensor) -> Tensor:
    return rows.sign() * rows.abs().mean(dim=1, keepdim=True)
