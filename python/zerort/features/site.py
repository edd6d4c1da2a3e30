"""What a feature is built on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from zerort.config import Config
from zerort.step.accumulation import Counters
from zerort.step.events import Feature
from zerort.step.readings import Components

__all__ = ["Site"]

F = TypeVar("F", bound=Feature)


@dataclass(frozen=True)
class Site:
    """One engine, as its features see it while it is made."""

    module: nn.Module
    parts: Components
    counters: Counters
    features: list[Feature] = field(default_factory=list)
    """Those that are open, in the order of the table."""

    @property
    def config(self) -> Config:
        """The configuration, typed."""
        return self.parts.config

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reports."""
        return self.parts.mesh.rank == 0

    def find(self, kind: type[F]) -> F | None:
        """The feature of this kind, if it is open."""
        return next((each for each in self.features if isinstance(each, kind)), None)
