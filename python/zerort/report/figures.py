"""All figures of a run that the page shows and the findings look at, computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from zerort.report.buckets import BucketCost, bucket_costs
from zerort.report.run import Run
from zerort.report.split import Split, median_step, split, typical
from zerort.report.wire import Wire, wire
from zerort.report.words import KIND_WORDS, ms

__all__ = ["Figures", "Outlier", "Voting", "figures"]

OUTLIER = 1.5
"""A step that took so many times the median is one."""


@dataclass(frozen=True)
class Outlier:
    """A step that took much longer than the others, and where most of the difference was."""

    number: int
    wall: float
    rank: int
    kind: str
    longer: float
    """By how many milliseconds that kind was longer on that rank."""
    excess: float
    """By how many milliseconds the step was longer than the median."""

    @property
    def words(self) -> str:
        """Who was longer and in what, where that says most of it."""
        if self.longer < self.excess / 2:
            return "no rank computed that much longer: the wire or the machine was busy"
        where = KIND_WORDS.get(self.kind, self.kind)
        return f"rank {self.rank} was {ms(self.longer)} longer {where}"


@dataclass(frozen=True)
class Voting:
    """How ranks came to the vote: how late each on average, after the first of them."""

    late: Mapping[int, float]
    last: int
    """The rank that most often came last."""
    share: float
    """In how many of the steps it did."""


@dataclass(frozen=True)
class Figures:
    """Of one run, over its typical steps unless it says otherwise."""

    run: Run
    numbers: Sequence[int]
    drawn: int
    """The median step."""
    split: Split
    ranks: Mapping[int, Split]
    buckets: Sequence[BucketCost]
    wire: Wire | None
    walls: Mapping[int, float]
    """Length of every step."""
    median: float
    outliers: Sequence[Outlier]
    voting: Voting | None

    def fact(self, name: str, default: int = 0) -> int:
        """A count that the trace's head has."""
        return int(self.run.facts.get(name, default))

    def steps_with(self, holds: Mapping[int, bool]) -> float:
        """The share of the typical steps for which something holds."""
        return sum(holds.values()) / len(holds) if holds else 0.0


def figures(run: Run) -> Figures:
    """Computes them."""
    numbers = typical(run)
    walls = {number: run.wall(number) for number in run.numbers}
    middle = median(walls[number] for number in run.settled)
    ranks = {rank.rank: split(run, numbers, [rank.rank]) for rank in run.ranks}
    return Figures(
        run,
        numbers,
        median_step(run),
        split(run, numbers),
        ranks,
        bucket_costs(run, numbers),
        wire(run, numbers),
        walls,
        middle,
        _outliers(run, walls, middle, ranks),
        _voting(run),
    )


def _outliers(
    run: Run, walls: Mapping[int, float], middle: float, ranks: Mapping[int, Split]
) -> list[Outlier]:
    usual = {rank: parts.by_kind() for rank, parts in ranks.items()}
    found = []
    for number in run.settled:
        if walls[number] <= OUTLIER * middle:
            continue
        longer = [
            (took - usual[rank.rank].get(kind, 0.0), rank.rank, kind)
            for rank in run.ranks
            for kind, took in split(run, [number], [rank.rank]).by_kind().items()
            # Who waits is not who was slow.
            if kind not in ("exposed", "vote", "publish") or len(run.ranks) == 1
        ]
        by, rank, kind = max(longer)
        found.append(Outlier(number, walls[number], rank, kind, by, walls[number] - middle))
    return found


def _voting(run: Run) -> Voting | None:
    if len(run.ranks) < 2:
        return None
    came = [
        {rank.rank: rank.steps[number].vote_start - rank.ahead[number] for rank in run.ranks}
        for number in run.settled
    ]
    late = {
        rank.rank: median(at[rank.rank] - min(at.values()) for at in came) for rank in run.ranks
    }
    last = Counter(max(at, key=lambda rank: at[rank]) for at in came)
    rank, times = last.most_common(1)[0]
    return Voting(late, rank, times / len(came))
