"""What a finding is, and from when on something is worth one."""

from __future__ import annotations

from dataclasses import dataclass

from zerort.report.figures import Figures

__all__ = ["LEAST_MS", "LEAST_SHARE", "Finding", "matters"]

LEAST_MS = 0.5
LEAST_SHARE = 0.02


@dataclass(frozen=True)
class Finding:
    """One thing that costs time."""

    key: str
    """Names the kind, for programs."""
    cost: float
    """Milliseconds of a step that it is about; 0 for good news."""
    words: str
    remedy: str
    """Empty where there is nothing to do."""


def matters(took: float, figures: Figures, share: float = LEAST_SHARE) -> bool:
    """Whether so many milliseconds of a step are worth words."""
    return took >= max(LEAST_MS, share * figures.split.wall)
