"""How parameters lie in flat memory: in which form, and at which offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Alone", "Extent", "Form"]


@dataclass(frozen=True)
class Form:
    """A parameter's shape, and the dense strides in which its elements lie in flat memory; both in
    elements.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Form:
        """Keeps a dense memory format such as channels-last; gaps between elements are closed. Its
        values may be sharded.
        """
        alike = torch.empty_strided(parameter.shape, parameter.stride(), device="meta")
        return cls(tuple(parameter.shape), tuple(torch.empty_like(alike).stride()))

    @property
    def order(self) -> tuple[int, ...]:
        """The strides, or () where elements lie in the order of their indices. A dimension of one
        element has stride 0, for its own means nothing.
        """
        whole = torch.empty(self.shape, device="meta")
        if whole.as_strided(self.shape, self.strides).is_contiguous():
            return ()
        pairs = zip(self.strides, self.shape, strict=True)
        return tuple(stride if size > 1 else 0 for stride, size in pairs)

    def over(self, flat: Tensor) -> Tensor:
        """`flat` (numel,) as a view in this form."""
        return flat.as_strided(self.shape, self.strides)


class Extent(Protocol):
    """Where parameters lie in flat memory, in elements: a bucket, as the core has planned it."""

    @property
    def numel(self) -> int:
        """Of all, padding included."""

    @property
    def offsets(self) -> Sequence[int]:
        """Of each parameter."""

    @property
    def numels(self) -> Sequence[int]:
        """Of each parameter."""


class Alone(NamedTuple):
    """A bucket of one parameter, which is not planned."""

    numel: int
    numels: Sequence[int]
    offsets: Sequence[int] = (0,)

    @classmethod
    def of(cls, numel: int, world: int) -> Alone:
        """With an equal part for each of `world` ranks."""
        return cls(-(-numel // world) * world, (numel,))
