"""What changed between two runs, before and after: the step, its parts, and each bucket.

Buckets are paired by number. Where their parameters differ, because buckets were cut anew, both are
named. A change that lies within the spread of the steps of either run is called none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from zerort.report.buckets import BucketCost
from zerort.report.figures import Figures
from zerort.report.words import KIND_NAMES, amount, ms

__all__ = ["BucketChange", "Change", "Difference", "compare", "difference"]

_FACTS = ("world", "device", "stage", "micro_batches", "window")


@dataclass(frozen=True)
class Change:
    """Milliseconds of a typical step, before and after."""

    name: str
    before: float
    after: float

    @property
    def by(self) -> float:
        """Below 0 where it became shorter."""
        return self.after - self.before


@dataclass(frozen=True)
class BucketChange:
    """A bucket's cost in milliseconds of a step and its bytes; None where a run has none of that
    number.
    """

    bucket: int
    contents: str
    cost_before: float | None
    cost_after: float | None
    bytes_before: int | None
    bytes_after: int | None


@dataclass(frozen=True)
class Difference:
    """Of two runs."""

    step: Change
    spread: float
    """How far apart the quartiles of the steps of a run are, of the two the larger: ms."""
    parts: Sequence[Change]
    buckets: Sequence[BucketChange]
    facts: Sequence[tuple[str, str, str]]
    """What differs of the runs themselves: name, before, after."""

    @property
    def changed(self) -> bool:
        """Whether the step's length changed by more than steps differ anyway."""
        return abs(self.step.by) > self.spread


def difference(before: Figures, after: Figures) -> Difference:
    """Compares typical steps."""
    kinds = list(dict.fromkeys([*before.split.by_kind(), *after.split.by_kind()]))
    return Difference(
        Change("step", before.split.wall, after.split.wall),
        max(_spread(before), _spread(after)),
        [
            Change(KIND_NAMES.get(kind, kind), before.split.total(kind), after.split.total(kind))
            for kind in kinds
        ],
        _buckets(before.buckets, after.buckets),
        [
            (name, str(one), str(other))
            for name in _FACTS
            if (one := before.run.facts.get(name)) != (other := after.run.facts.get(name))
        ],
    )


def _spread(figures: Figures) -> float:
    walls = [figures.walls[number] for number in figures.run.settled]
    if len(walls) < 2:
        return 0.0
    low, _, high = quantiles(walls, n=4)
    return high - low


def _buckets(before: Sequence[BucketCost], after: Sequence[BucketCost]) -> list[BucketChange]:
    """Those whose cost changed most first."""
    one = {bucket.bucket: bucket for bucket in before}
    other = {bucket.bucket: bucket for bucket in after}
    found = [_pair(each, one.get(each), other.get(each)) for each in one.keys() | other.keys()]
    return sorted(
        found,
        key=lambda each: (-abs((each.cost_after or 0) - (each.cost_before or 0)), each.bucket),
    )


def _pair(number: int, one: BucketCost | None, other: BucketCost | None) -> BucketChange:
    contents = list(dict.fromkeys(each.contents for each in (one, other) if each is not None))
    return BucketChange(
        number,
        " / ".join(contents),
        None if one is None else one.cost,
        None if other is None else other.cost,
        None if one is None else one.size,
        None if other is None else other.size,
    )


def compare(found: Difference, most: int = 20) -> Sequence[RenderableType]:
    """Tables and a line in words."""
    parts = _table("A typical step", "part", "before", "after", "change")
    for change in [*found.parts, found.step]:
        style = "bold" if change is found.step else ""
        row = (ms(change.before), ms(change.after), _signed(change.by))
        parts.add_row(Text(change.name), *row, style=style)
    buckets = _table("Buckets: cost of a step", "bucket", "before", "after", "sends", "contents")
    for each in found.buckets[:most]:
        sizes = [size for size in (each.bytes_before, each.bytes_after) if size is not None]
        buckets.add_row(
            Text(str(each.bucket)),
            *("-" if cost is None else ms(cost) for cost in (each.cost_before, each.cost_after)),
            " > ".join(dict.fromkeys(map(amount, sizes))),
            Text(each.contents),
        )
    left = len(found.buckets) - most
    more = [f"{left} more buckets changed less"] if left > 0 else []
    facts = [f"{name}: {one} before, {other} after" for name, one, other in found.facts]
    shown: list[RenderableType] = [parts, ""]
    if found.buckets:
        shown += [buckets, *more, ""]
    return [*shown, *facts, _verdict(found)]


def _verdict(found: Difference) -> str:
    by, spread = found.step.by, ms(found.spread)
    if not found.changed:
        return f"no change beyond the spread of the steps, {spread}: {_signed(by)}"
    share = abs(by) / found.step.before if found.step.before else 0.0
    longer = "longer" if by > 0 else "shorter"
    return f"a step is {ms(abs(by))} ({share:.0%}) {longer}; steps of a run spread over {spread}"


def _signed(by: float) -> str:
    return f"{'+' if by > 0 else '-'}{ms(abs(by))}"


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, head in enumerate(heads):
        is_text = index == 0 or head == "contents"
        table.add_column(head, justify="left" if is_text else "right", overflow="fold")
    return table
