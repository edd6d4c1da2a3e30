"""What `initialize` is made of: checks, comparisons between ranks, arguments and data.

All of it happens inside one consensus: `agreed` and `gathered` are how a step of the start is
taken, so that a rank on which it fails leaves none of its peers waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from zerort.errors import ConfigError, PlanError
from zerort.mesh import Consensus, Control

__all__ = ["agreed", "first", "gathered"]

T = TypeVar("T")

_HEADLINE = "no rank starts, because one cannot"


def agreed(control: Control, attempt: Callable[[], T]) -> T:
    """Runs `attempt` on all ranks. Where it raised on one, that rank raises its own error and the
    others `PlanError` with its reason.
    """
    return Consensus(control, PlanError).agree(_HEADLINE, attempt)


def gathered(control: Control, attempt: Callable[[], T]) -> list[T]:
    """`agreed`, but returns every rank's result, by rank."""
    return Consensus(control, PlanError).gather(_HEADLINE, attempt)


def first(control: Control, attempt: Callable[[], T]) -> T:
    """Runs `attempt` on rank 0 and returns its result on all. Where it raised, rank 0 raises its
    own error and the others `ConfigError` with its reason.
    """
    return Consensus(control, ConfigError).first(_HEADLINE, attempt)
