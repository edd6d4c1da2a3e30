"""Where a parameter's values are before a bucket takes them.

A model may be there on every rank, each with values of its own, of which rank 0's count; or its
parameters may have been sharded since they were made, and come together when their bucket is
filled. A bucket asks each parameter's origin and does not tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

__all__ = ["Origin", "Present"]


class Origin(Protocol):
    """One parameter's values."""

    @property
    def is_common(self) -> bool:
        """Whether `fill` gives all ranks the same. All ranks call it together then."""

    def fill(self, view: Tensor) -> None:
        """Writes them into `view`, of the parameter's shape; the origin is not asked again."""


@dataclass(frozen=True)
class Present:
    """The parameter has them itself, whole."""

    parameter: nn.Parameter
    is_common = False

    def fill(self, view: Tensor) -> None:
        """A copy."""
        view.copy_(self.parameter)
