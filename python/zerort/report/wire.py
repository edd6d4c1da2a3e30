"""What was on the wire: how long it was busy, at what rate, and what a collective costs before its
first byte.

A collective moves nothing before the last rank has started it, so it counts from that moment on,
on the aligned clocks, until the last rank has completed it. With ranks missing it counts from what
is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from zerort.report.run import Run
from zerort.report.timeline import Collective, RankStep

__all__ = ["Latency", "Transfer", "Wire", "busy", "latency", "transfers", "wire"]

REDUCING = ("reduce_scatter", "all_reduce", "all_to_all", "reduce")
_SPREAD = 4.0
"""Largest size over smallest from which on time before the first byte differs from the rate."""
_FEW = 8


@dataclass(frozen=True)
class Transfer:
    """One collective of one step, over all ranks; on the first rank's clock."""

    step: int
    operation: str
    bucket: int
    start: float
    end: float
    size: int

    @property
    def took(self) -> float:
        """Milliseconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Latency:
    """A straight line through times over sizes: ms before the first byte, ms a byte."""

    alpha: float
    beta: float

    def took(self, size: float) -> float:
        """Milliseconds of a collective of so many bytes."""
        return self.alpha + self.beta * size


@dataclass(frozen=True)
class Wire:
    """The reductions of a typical step."""

    size: float
    """Bytes that each rank sends them."""
    busy: float
    """Milliseconds in which at least one was under way."""
    launches: float
    line: Latency | None
    """None where the sizes are too alike to tell."""
    sizes: Sequence[int]
    """Of the launches of a step."""

    @property
    def rate(self) -> float:
        """Bytes a second while busy."""
        return self.size / self.busy * 1000 if self.busy else 0.0


def wire(run: Run, numbers: Sequence[int]) -> Wire | None:
    """None where nothing is reduced, as on one rank."""
    found = [each for each in transfers(run, numbers) if each.operation in REDUCING]
    if not found:
        return None
    by_step: dict[int, list[Transfer]] = defaultdict(list)
    for each in found:
        by_step[each.step].append(each)
    steps = list(by_step.values())
    return Wire(
        size=sum(each.size for each in found) / len(steps),
        busy=median(busy(each) for each in steps),
        launches=len(found) / len(steps),
        line=latency([(each.size, each.took) for each in found if _is_alone(each, by_step)]),
        sizes=[each.size for each in steps[-1]],
    )


def transfers(run: Run, numbers: Sequence[int]) -> list[Transfer]:
    """Every collective of these steps, those of all ranks that belong together as one."""
    found = []
    for number in numbers:
        together: dict[tuple[str, int, int], list[tuple[float, float, int]]] = defaultdict(list)
        for rank in run.ranks:
            seen: dict[tuple[str, int], int] = defaultdict(int)
            ahead = rank.ahead[number]
            for one in sorted(_sent(rank.steps[number]), key=lambda one: one.start):
                key = one.operation, one.bucket
                nth = one.operation, one.bucket, seen[key]
                together[nth].append((one.start - ahead, one.end - ahead, one.size))
                seen[key] += 1
        for (operation, bucket, _), parts in together.items():
            start = max(part[0] for part in parts)
            end = max(part[1] for part in parts)
            found.append(Transfer(number, operation, bucket, start, max(start, end), parts[0][2]))
    return found


def _sent(step: RankStep) -> Iterator[Collective]:
    """A step's collectives. On an accelerator they have no spans of their own: there a reduction is
    on the wire from its launch until its result could be taken, at the most.
    """
    yield from step.collectives
    if any(one.operation in REDUCING for one in step.collectives):
        return
    for life in step.lives:
        size = int(life.args.get("bytes", 0))
        yield Collective("reduce_scatter", life.bucket, life.launched, life.landed, size)


def busy(found: Iterable[Transfer]) -> float:
    """The length of the union of their times."""
    total, until = 0.0, float("-inf")
    for each in sorted(found, key=lambda each: each.start):
        total += max(0.0, each.end - max(each.start, until))
        until = max(until, each.end)
    return total


def _is_alone(one: Transfer, by_step: dict[int, list[Transfer]]) -> bool:
    """Whether the wire was its own for most of its time."""
    shared = sum(
        max(0.0, min(one.end, other.end) - max(one.start, other.start))
        for other in by_step[one.step]
        if other is not one
    )
    return shared <= one.took / 10


def latency(points: Sequence[tuple[int, float]]) -> Latency | None:
    """A line through the medians of each size, weighted by how many there are, with neither part
    negative. None where sizes are too alike, or too few.
    """
    grouped: dict[int, list[float]] = defaultdict(list)
    for size, took in points:
        grouped[size].append(took)
    known = {size: median(times) for size, times in grouped.items() if size > 0}
    if len(points) < _FEW or len(known) < 2 or max(known) < _SPREAD * min(known):
        return None
    weights = {size: len(grouped[size]) for size in known}
    total = sum(weights.values())
    x = sum(weights[size] * size for size in known) / total
    y = sum(weights[size] * took for size, took in known.items()) / total
    spread = sum(weights[size] * (size - x) ** 2 for size in known)
    beta = sum(weights[size] * (size - x) * (took - y) for size, took in known.items()) / spread
    beta = max(0.0, beta)
    return Latency(max(0.0, y - beta * x), beta)
