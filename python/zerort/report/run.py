"""The traces of a run's ranks, read together: of one start, over the steps that all have, and on
one clock.

Clocks are aligned by the end of each step's vote, which all ranks learn at once, so that traces of
several hosts lie on one axis whatever their calendars say. What cannot be one run is refused by a
line; what is incomplete is kept and said in `Run.losses`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from zerort.report.timeline import RankStep, rank_steps
from zerort.trace.reader import Recorded, TraceError, read

__all__ = ["Rank", "Run", "load", "trace_files"]

_NEAR = 2
"""Steps on either side of one whose votes align it."""
_JUMP_MS = 20.0
"""What clocks may differ by from one step to the next, at the least."""


@dataclass(frozen=True)
class Rank:
    """One rank: its steps by number, and by how much its clock is ahead of the first rank's."""

    rank: int
    steps: Mapping[int, RankStep]
    ahead: Mapping[int, float]
    """By step, in milliseconds."""


@dataclass(frozen=True)
class Run:
    """Ranks that all have the steps `numbers`. `losses` says what is missing, a line each."""

    ranks: Sequence[Rank]
    numbers: Sequence[int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[str] = ()

    @property
    def world(self) -> int:
        """Ranks that the run had, whether their traces are here or not."""
        return int(self.facts.get("world", len(self.ranks)))

    @property
    def settled(self) -> Sequence[int]:
        """The steps without the first one of a run, which is slower than all that follow: it makes
        memory and learns the order of gradients.
        """
        return self.numbers[1:] if len(self.numbers) > 1 else self.numbers

    def wall(self, number: int) -> float:
        """A step's length on average over ranks."""
        walls = [rank.steps[number].wall for rank in self.ranks]
        return sum(walls) / len(walls)

    def contents(self, bucket: int) -> str:
        """The first and last parameter of a bucket, as far as that is known."""
        return str(self.facts.get(f"bucket {bucket}", ""))


def load(paths: Iterable[str | Path]) -> Run:
    """Reads files, and of folders the traces in them. Raises `TraceError`."""
    recorded = {path: read(path) for path in trace_files(paths)}
    owners = _owners(recorded)
    steps = {owners[rank].rank: rank_steps(owners[rank]) for rank in sorted(owners)}
    losses = [*_missing(owners), *_broken(owners, steps)]
    having = {rank: {step.number: step for step in found} for rank, found in steps.items() if found}
    if not having:
        raise TraceError("the trace holds no whole step")
    numbers = sorted(set.intersection(*(set(found) for found in having.values())))
    if not numbers:
        spans = "; ".join(f"rank {rank}: {_range(found)}" for rank, found in having.items())
        raise TraceError(f"the ranks have no step in common ({spans}): raise zerort.trace.capacity")
    facts = next(iter(owners[rank] for rank in sorted(owners))).facts
    return Run(_aligned(having, numbers), numbers, facts, losses)


def trace_files(paths: Iterable[str | Path]) -> list[Path]:
    """Of folders the traces in them. Raises `TraceError` for one without."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(each for each in path.glob("*.json") if _is_trace(each))
        if not found:
            raise TraceError(f"{path}: a folder without a trace of zerort")
        files += found
    return list(dict.fromkeys(files))


def _is_trace(path: Path) -> bool:
    """A folder may hold other JSON, such as a configuration."""
    with path.open("rb") as file:
        return file.read(64).startswith(b'{"displayTimeUnit":"ms","otherData":')


def _owners(recorded: Mapping[Path, Recorded]) -> dict[int, Recorded]:
    """By rank. Raises `TraceError` where they are not one run."""
    first: tuple[Path, Recorded] | None = None
    owners: dict[int, Recorded] = {}
    for path, one in recorded.items():
        first = first or (path, one)
        name, other = one.facts.get("name", ""), first[1].facts.get("name", "")
        if name != other:
            raise TraceError(
                f"{path}: of another run than {first[0]} ({name or 'unnamed'}, "
                f"{other or 'unnamed'}): give the files of one run, one of each rank"
            )
        if one.rank in owners:
            raise TraceError(
                f"rank {one.rank} is in two of the files: give the files of one run, one of each "
                "rank"
            )
        owners[one.rank] = one
    return owners


def _missing(owners: Mapping[int, Recorded]) -> list[str]:
    world = max(int(one.facts.get("world", 0)) for one in owners.values())
    missing = [rank for rank in range(world) if rank not in owners]
    if not missing:
        return []
    named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return [
        f"of {world} ranks {len(missing)} are missing ({named}): who waits for them is not seen"
    ]


def _broken(
    owners: Mapping[int, Recorded], steps: Mapping[int, Sequence[RankStep]]
) -> Iterable[str]:
    last = max((found[-1].number for found in steps.values() if found), default=0)
    for rank, found in steps.items():
        if not found:
            yield f"rank {rank} has no whole step, so it is left out"
        elif owners[rank].cut:
            yield f"the file of rank {rank} breaks off after step {found[-1].number}"
        elif found[-1].number < last:
            yield f"rank {rank} ends after step {found[-1].number}, others after step {last}"
        if owners[rank].dropped:
            yield (
                f"rank {rank} had forgotten {owners[rank].dropped:,} older events: raise "
                "zerort.trace.capacity"
            )


def _range(steps: Iterable[int]) -> str:
    found = sorted(steps)
    return f"{found[0]} to {found[-1]}"


def _aligned(having: Mapping[int, Mapping[int, RankStep]], numbers: Sequence[int]) -> list[Rank]:
    """Raises `TraceError` where a clock jumps."""
    reference, *_ = having.values()
    walls = median(reference[number].wall for number in numbers)
    found = []
    for rank, steps in having.items():
        apart = [steps[number].vote_end - reference[number].vote_end for number in numbers]
        smooth = [median(apart[max(0, at - _NEAR) : at + _NEAR + 1]) for at in range(len(numbers))]
        jump = _jump(apart, max(_JUMP_MS, walls / 2))
        if jump is not None:
            at, by = jump
            raise TraceError(
                f"rank {rank}: its clock jumps by {by:,.0f} ms against that of rank "
                f"{min(having)} before step {numbers[at]}: ranks cannot be compared; give the "
                "file of one rank alone"
            )
        ahead = dict(zip(numbers, smooth, strict=True))
        found.append(Rank(rank, {number: steps[number] for number in numbers}, ahead))
    return found


def _jump(apart: Sequence[float], limit: float) -> tuple[int, float] | None:
    """Where a distance changes for good, and by how much. A vote that one rank sees late, because
    its process had no core, changes it once.
    """
    for at in range(1, len(apart)):
        before, after = apart[max(0, at - 3) : at], apart[at : at + 3]
        if min(len(before), len(after)) < min(3, len(apart) // 2):
            continue
        by = median(after) - median(before)
        if abs(by) > limit and abs(apart[at] - apart[at - 1]) > limit:
            return at, by
    return None
