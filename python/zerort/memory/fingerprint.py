"""Bits over what lies in memory, by which a write into it shows without a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["digest", "fingerprint", "first_of", "line_prints"]

_PIECE = 1 << 16
"""Bytes. Larger ones that come and go teach the C library to keep what is freed, and a model that
is built under a limit of memory no longer fits.
"""
_FACTOR = -7046029254386353131
"""Odd, and without a pattern: 2 to the power of 64 by the golden ratio."""


def fingerprint(values: Tensor) -> Tensor:
    """A scalar (int64) on the device of `values` (n,), whose bytes are a multiple of 8.

    Another value of one element always changes it; of several, all but with a chance of 1 in 2^64.
    Takes three times their memory for a moment.
    """
    words = _mixed(values)
    places = torch.arange(1, 2 * words.numel(), 2, device=words.device)
    return words.mul_(places).sum()


def digest(values: Tensor) -> int:
    """A number over a tensor's elements, in the order of indices, of any shape and dtype. Reads the
    device. Takes memory for a piece of it at a time, and a copy where it is not contiguous.
    """
    found = values.numel()
    flat = values.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        padded = torch.nn.functional.pad(piece, (0, -piece.numel() % 8))
        found = (found * _FACTOR + int(fingerprint(padded))) % 2**63
    return found


def line_prints(values: Tensor, line: int) -> Tensor:
    """The same for each `line` bytes of `values`, a multiple of 8: (lines,) int64."""
    words = _mixed(values).view(-1, line // 8)
    places = torch.arange(1, 2 * words.shape[1], 2, device=words.device)
    return words.mul_(places).sum(1)


def first_of(marked: Tensor) -> Tensor:
    """The first place where `marked` (n,) is true, n where it is nowhere: a scalar on its
    device.
    """
    count = marked.numel()
    if not count:
        return torch.zeros((), dtype=torch.int64, device=marked.device)
    places = torch.arange(count, device=marked.device)
    return torch.where(marked, places, count).amin()


def _mixed(values: Tensor) -> Tensor:
    words = values.view(torch.int64)
    mixed = (words ^ _upper(words, 32)).mul_(_FACTOR)
    mixed ^= _upper(mixed, 29)
    return mixed


def _upper(words: Tensor, by: int) -> Tensor:
    """Shifted right, with zeros for what comes in."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)
