"""From timed collectives to alpha and beta: seconds = alpha + beta * bytes.

What it guarantees: the fit depends on its samples alone, so ranks that have the same ones have the
same figures; a few samples that something else on the machine has held up move it little (Theil and
Sen's median of slopes). What it does not do: it reads no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import NamedTuple

__all__ = ["Line", "Sample", "fit", "middle"]


class Sample(NamedTuple):
    """A collective that was timed."""

    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """What a kind of collective costs."""

    alpha: float
    """Seconds, however little is sent."""
    beta: float
    """Seconds for each byte."""

    def seconds(self, nbytes: float) -> float:
        """Of one that sends so many bytes."""
        return self.alpha + self.beta * nbytes

    def times(self, alpha: float, beta: float) -> Line:
        """Each figure so many times."""
        return Line(alpha * self.alpha, beta * self.beta)

    def beyond(self, seconds: float) -> Line:
        """Behind so many seconds more."""
        return Line(self.alpha + seconds, self.beta)

    @property
    def rate(self) -> float:
        """Bytes a second behind alpha; infinite where more bytes took no longer."""
        return 1 / self.beta if self.beta else float("inf")


def fit(samples: Sequence[Sample]) -> Line:
    """The line through `samples`, of two sizes at least, neither figure negative.

    Beta is the median of the slopes between sizes, each as heavy as the sizes lie apart; alpha what
    the samples take beyond that, small ones counting most, for which it is all. Raises `ValueError`
    for samples of one size.
    """
    sizes = sorted({sample.nbytes for sample in samples})
    if len(sizes) < 2:
        raise ValueError(f"expected samples of two sizes at least, got {len(sizes)}")
    typical = [(n, middle([s.seconds for s in samples if s.nbytes == n])) for n in sizes]
    slopes = [
        ((there - here) / (large - small), float(large - small))
        for (small, here), (large, there) in combinations(typical, 2)
    ]
    beta = max(0.0, _weighted_median(slopes))
    rest = [(seconds - beta * nbytes, 1 / (sizes[0] + nbytes)) for nbytes, seconds in typical]
    return Line(max(0.0, _weighted_median(rest)), beta)


def middle(times: Sequence[float]) -> float:
    """The median of `times`, one at least: what a step meets. What is held up by chance moves it
    little, while the fastest are those that nothing else crossed, which a step's do not stay.
    """
    return median(times)


def _weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """Of (value, weight): half of the weight lies on either side."""
    ordered = sorted(values)
    half, passed = sum(weight for _, weight in ordered) / 2, 0.0
    for value, weight in ordered:
        passed += weight
        if passed >= half:
            return value
    raise ValueError("no values")
