"""One rank's steps: what its training loop did when, without gaps or overlaps, and what went on
beside it.

A moment belongs to the innermost span around it. What is outside all of them is the caller's own:
its data loader, its logging.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from zerort.trace.reader import Event, Life, Recorded, lives
from zerort.trace.sink import MAIN, STEP, WAIT

__all__ = ["Collective", "RankStep", "Slice", "Whole", "rank_steps"]

_THING = re.compile(r"\b(bucket|unit) (\d+)")
_UPDATED = "all_gather of bucket"
"""What a forward waits for of a bucket below stage 3, where units are gathered for it."""
_KINDS = {"step": "engine", "retire": "sums"}
"""Ranges that go by another name here."""


@dataclass(frozen=True)
class Slice:
    """A stretch in which the loop did one thing."""

    kind: str
    """`forward`, `backward`, `exposed`, `vote`, `sums`, `optimizer`, `publish`, `engine`, the name
    of a feature's range, or `outside`.
    """
    start: float
    end: float
    what: str = ""
    """What it stood still for; empty where it did not."""

    @property
    def took(self) -> float:
        """Milliseconds."""
        return self.end - self.start

    @property
    def thing(self) -> tuple[str, int] | None:
        """The bucket or unit that it stood still for."""
        found = _THING.search(self.what)
        return (found[1], int(found[2])) if found else None


@dataclass(frozen=True)
class Collective:
    """One that was on the wire, from its start on this rank until it was complete there."""

    operation: str
    bucket: int
    start: float
    end: float
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Whole:
    """How long a unit's parameters had memory at stage 3."""

    unit: int
    buckets: tuple[int, ...]
    start: float
    end: float
    size: int


@dataclass
class RankStep:
    """One optimizer step of one rank."""

    number: int
    start: float
    end: float
    slices: list[Slice] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    wholes: list[Whole] = field(default_factory=list)

    @property
    def wall(self) -> float:
        """From the boundary before to its own."""
        return self.end - self.start

    @property
    def vote_start(self) -> float:
        """When this rank came to the vote; its end where there is none."""
        return min((part.start for part in self.slices if part.kind == "vote"), default=self.end)

    @property
    def vote_end(self) -> float:
        """When it knew the result, which all ranks learn at once."""
        return max((part.end for part in self.slices if part.kind == "vote"), default=self.end)

    def total(self, *kinds: str) -> float:
        """Milliseconds in these kinds."""
        return sum(part.took for part in self.slices if part.kind in kinds)


def rank_steps(recorded: Recorded) -> list[RankStep]:
    """The whole steps of a file, in order. With events dropped the first may lack some, so it is
    left out.
    """
    events = recorded.events
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            spans[str(tracks.get(event["tid"], ""))].append(event)
    main = sorted(spans[MAIN], key=lambda event: (event["ts"], -event["dur"]))
    ends = sorted((e["ts"] / 1000, e["args"]["step"]) for e in events if _is_end(e))
    if not ends:
        return []
    first = min([ends[0][0], *(event["ts"] / 1000 for event in main[:1])])
    starts = [first, *(at for at, _ in ends)]
    found = [
        RankStep(int(number), start, end)
        for (end, number), start in zip(ends, starts, strict=False)
    ]
    _fill(found, main, spans, lives(events))
    found = found[1:] if recorded.dropped else found
    return list({step.number: step for step in found}.values())


def _is_end(event: Event) -> bool:
    return event["ph"] == "i" and event["name"] == STEP and "step" in event.get("args", {})


def _fill(
    found: list[RankStep],
    main: Sequence[Event],
    spans: dict[str, list[Event]],
    every_life: Sequence[Life],
) -> None:
    """Gives each step what ended in it."""
    boundaries = [step.end for step in found]

    def step_at(moment: float) -> RankStep | None:
        at = bisect_left(boundaries, moment)
        return found[at] if at < len(found) else None

    inside: dict[int, list[Event]] = defaultdict(list)
    for event in main:
        at = bisect_left(boundaries, (event["ts"] + event["dur"]) / 1000)
        inside[at].append(event)
    for index, step in enumerate(found):
        step.slices = list(_slices(inside[index], step.start, step.end))
    for life in every_life:
        if (owner := step_at(life.retired)) is not None:
            owner.lives.append(life)
    for track, events in spans.items():
        if track.startswith("collectives"):
            for one in _collectives(events):
                if (owner := step_at(one.end)) is not None:
                    owner.collectives.append(one)
        elif track.startswith("unit "):
            for whole in _wholes(int(track.split()[1]), events):
                if (owner := step_at(whole.start)) is not None:
                    owner.wholes.append(whole)


def _slices(spans: Sequence[Event], since: float, until: float) -> Iterator[Slice]:
    """The innermost span at each moment from `since` to `until`; spans in order of their starts,
    outer ones first.
    """
    around: list[tuple[float, str, str]] = []  # end, kind, what
    at = since
    for span in [*spans, None]:
        start = until if span is None else min(max(span["ts"] / 1000, at), until)
        while around and around[-1][0] <= start:
            end, kind, what = around.pop()
            if end > at:
                yield Slice(kind, at, end, what)
                at = end
        if start > at:
            _, kind, what = around[-1] if around else (0.0, "outside", "")
            yield Slice(kind, at, start, what)
            at = start
        if span is not None:
            end = min((span["ts"] + span["dur"]) / 1000, around[-1][0] if around else until)
            around.append((end, *_named(span, [kind for _, kind, _ in around])))


def _named(span: Event, around: Sequence[str]) -> tuple[str, str]:
    """Kind, and what is waited for."""
    name = str(span["name"])
    if name != WAIT:
        return _KINDS.get(name, name), ""
    what = str(span.get("args", {}).get("what", ""))
    if what.startswith(_UPDATED) and (not around or around[-1] == "forward"):
        return "publish", what  # beside the next forward
    kept = next((kind for kind in reversed(around) if kind in ("vote", "publish")), "exposed")
    return kept, what


def _collectives(events: Iterable[Event]) -> Iterator[Collective]:
    for event in events:
        operation, _, bucket = str(event["name"]).partition(" b")
        if bucket.isdigit():
            start, end = event["ts"] / 1000, (event["ts"] + event["dur"]) / 1000
            size = int(event.get("args", {}).get("bytes", 0))
            yield Collective(operation, int(bucket), start, end, size)


def _wholes(unit: int, events: Iterable[Event]) -> Iterator[Whole]:
    for event in events:
        about = event.get("args", {})
        buckets = tuple(int(name[1:]) for name in str(about.get("buckets", "")).split())
        start, end = event["ts"] / 1000, (event["ts"] + event["dur"]) / 1000
        yield Whole(unit, buckets, start, end, int(about.get("bytes", 0)))
