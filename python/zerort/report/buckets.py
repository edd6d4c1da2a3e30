"""What each bucket costs a step: how long ranks stood still for it, and where its life went.

A bucket's cost is the time for which the loop stood still for its sum, for its part of a gather at
stage 3, or while its updated parameters were on their way. Time on the wire beneath compute costs
nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from zerort.report.run import Run
from zerort.report.timeline import RankStep
from zerort.trace.reader import Life

__all__ = ["BucketCost", "bucket_costs", "held_up"]


@dataclass(frozen=True)
class BucketCost:
    """One bucket in a typical step: phases are of one launch, what it cost is of a step."""

    bucket: int
    contents: str
    size: int
    """Bytes that each launch sends."""
    dtype: str
    params: int
    launches: float
    """A step."""
    filling: float
    queued: float
    in_flight: float
    summing: float
    exposed: float
    """The loop stood still for its sum."""
    gathered: float
    """For its parameters at stage 3."""
    published: float
    """For its updated parameters."""
    last: str
    """The parameter that comes last, in most launches."""
    last_share: float
    """In how many of them."""
    alone: float
    """How long it lacked that one alone."""
    behind: Mapping[str, float]
    """Share of launches by what it waited for once it was full."""

    @property
    def cost(self) -> float:
        """Of a step, by which buckets are sorted."""
        return self.exposed + self.gathered + self.published


def bucket_costs(run: Run, numbers: Sequence[int]) -> list[BucketCost]:
    """Every bucket's, the dearest first."""
    count = len(run.ranks) * len(numbers)
    lives: dict[int, list[tuple[Life, str]]] = defaultdict(list)
    waits: dict[tuple[str, int], float] = defaultdict(float)
    for rank in run.ranks:
        for number in numbers:
            step = rank.steps[number]
            for life, behind in held_up(step.lives):
                lives[life.bucket].append((life, behind))
            for key, took in _waits(step):
                waits[key] += took / count
    buckets = lives.keys() | {bucket for _, bucket in waits}
    found = [_cost(run, bucket, lives.get(bucket, []), waits, count) for bucket in buckets]
    return sorted(found, key=lambda each: (-each.cost, -each.in_flight, each.bucket))


def held_up(lives: Iterable[Life]) -> list[tuple[Life, str]]:
    """Each life, and what the full bucket waited for until it was launched: `bucket N` whose turn
    came first, `room for it` until an earlier one was retired, `` for no time to speak of.
    """
    ordered = sorted(lives, key=lambda life: life.launched)
    found: list[tuple[Life, str]] = []
    for at, life in enumerate(ordered):
        behind = ""
        if life.queued > 0.05:
            earlier = ordered[:at]
            if earlier and earlier[-1].launched > life.full:
                # where that one had no room, neither had this one
                behind = "room" if found[-1][1] == "room" else f"bucket {earlier[-1].bucket}"
            elif any(life.full < other.retired <= life.launched + 0.01 for other in earlier):
                behind = "room"
        found.append((life, behind))
    return found


def _waits(step: RankStep) -> Iterable[tuple[tuple[str, int], float]]:
    """((what for, bucket), ms); what is waited for a unit is its buckets' in equal parts."""
    members = {whole.unit: whole.buckets for whole in step.wholes}
    for part in step.slices:
        if part.thing is None:
            continue
        thing, number = part.thing
        if thing == "bucket":
            yield (part.kind, number), part.took
        else:
            buckets = members.get(number, ())
            for bucket in buckets:
                yield ("gathered", bucket), part.took / len(buckets)


def _cost(
    run: Run,
    bucket: int,
    lives: Sequence[tuple[Life, str]],
    waits: Mapping[tuple[str, int], float],
    count: int,
) -> BucketCost:
    phases = [life.phases for life, _ in lives] or [(0.0, 0.0, 0.0, 0.0)]
    filling, queued, in_flight, summing = map(median, zip(*phases, strict=True))
    about = lives[-1][0].args if lives else {}
    last, times = _most(str(life.args.get("last", "")) for life, _ in lives)
    alone = [
        float(life.args.get("alone_ms", 0.0))
        for life, _ in lives
        if life.args.get("last", "") == last
    ]
    behind = Counter(what for _, what in lives)
    return BucketCost(
        bucket,
        run.contents(bucket),
        int(about.get("bytes", 0)),
        str(about.get("dtype", "")),
        int(about.get("params", 0)),
        len(lives) / count,
        filling,
        queued,
        in_flight,
        summing,
        waits.get(("exposed", bucket), 0.0),
        waits.get(("gathered", bucket), 0.0),
        waits.get(("publish", bucket), 0.0),
        last,
        times / len(lives) if lives else 0.0,
        median(alone) if alone else 0.0,
        {what: n / len(lives) for what, n in behind.most_common() if what},
    )


def _most(words: Iterable[str]) -> tuple[str, int]:
    found = Counter(words).most_common(1)
    return found[0] if found else ("", 0)
