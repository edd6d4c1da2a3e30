"""What a step is made of: parts that do not overlap and add up to its length.

A typical step is the mean over the middle half of the steps by their length, so that a part is not
distorted by outliers and the parts still add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zerort.report.run import Run
from zerort.report.timeline import Slice

__all__ = ["COMPUTE", "KINDS", "Part", "Split", "median_step", "split", "typical"]

COMPUTE = ("forward", "backward")
KINDS = (*COMPUTE, "exposed", "sums", "vote", "optimizer", "publish", "engine", "outside")
"""In the order in which they are drawn; ranges of features come before the last two."""


@dataclass(frozen=True)
class Part:
    """A part of a step; `of` is the bucket or unit that was waited for, as words."""

    kind: str
    of: str
    took: float


@dataclass(frozen=True)
class Split:
    """The parts of a typical step."""

    parts: Sequence[Part]

    @property
    def wall(self) -> float:
        """All of it."""
        return sum(part.took for part in self.parts)

    def total(self, *kinds: str) -> float:
        """Milliseconds in these kinds."""
        return sum(part.took for part in self.parts if part.kind in kinds)

    def share(self, *kinds: str) -> float:
        """Of the whole."""
        return self.total(*kinds) / self.wall if self.wall else 0.0

    def by_kind(self) -> dict[str, float]:
        """Every kind that there is, in the order of `KINDS`."""
        kinds = {part.kind for part in self.parts}
        return {kind: self.total(kind) for kind in sorted(kinds, key=_place)}

    def exposed(self) -> list[tuple[str, float]]:
        """What the step stood still for, the longest first."""
        found = [(part.of, part.took) for part in self.parts if part.kind == "exposed"]
        return sorted(found, key=lambda item: -item[1])


def typical(run: Run) -> Sequence[int]:
    """The middle half of the steps by their length."""
    ordered = sorted(run.settled, key=run.wall)
    cut = len(ordered) // 4
    return sorted(ordered[cut : len(ordered) - cut])


def median_step(run: Run) -> int:
    """The step of median length: of two in the middle the shorter."""
    ordered = sorted(run.settled, key=run.wall)
    return ordered[(len(ordered) - 1) // 2]


def split(run: Run, numbers: Sequence[int], ranks: Iterable[int] | None = None) -> Split:
    """Over these steps and ranks (all of them where None)."""
    wanted = [rank for rank in run.ranks if ranks is None or rank.rank in ranks]
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for rank in wanted:
        for number in numbers:
            for part in rank.steps[number].slices:
                sums[part.kind, _of(part)] += part.took
    count = len(wanted) * len(numbers)
    ordered = sorted(sums.items(), key=lambda item: (_place(item[0][0]), -item[1]))
    return Split([Part(kind, of, took / count) for (kind, of), took in ordered])


def _of(part: Slice) -> str:
    if part.kind != "exposed":
        return ""
    return " ".join(map(str, part.thing)) if part.thing else part.what or "a collective"


def _place(kind: str) -> tuple[int, str]:
    known = KINDS.index(kind) if kind in KINDS else KINDS.index("engine")
    return known, kind
