"""Trace files, read back: their steps and bucket lives as plain numbers.

Reads what `ChromeSink` writes and refuses anything else by name: a file cut short, another
program's trace. Times are milliseconds here. Steps that are not whole (before the ring's memory,
after the last boundary) are left out.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from zerort.errors import ZerortError
from zerort.trace.sink import BUCKETS, MAIN, STEP, WAIT

__all__ = ["Event", "Life", "Recorded", "Step", "TraceError", "lives", "read", "steps"]

Event: TypeAlias = dict[str, Any]

RANGES = ("forward", "backward", "optimizer", "publish")

_ALWAYS = {"name", "pid", "tid"}
FIELDS = {
    "M": _ALWAYS | {"args"},
    "X": _ALWAYS | {"ts", "dur"},
    "i": _ALWAYS | {"ts"},
    "C": _ALWAYS | {"ts", "args"},
    "b": _ALWAYS | {"ts", "cat", "id"},
    "e": _ALWAYS | {"ts", "cat", "id"},
}
"""What an event of each phase must have."""


class TraceError(ZerortError, ValueError):
    """A trace file that cannot be read: names the file and what is wrong with it."""


@dataclass(frozen=True)
class Recorded:
    """One rank's file: its rank, its events, and how many older ones the ring had forgotten."""

    rank: int
    dropped: int
    events: list[Event]


@dataclass
class Step:
    """One optimizer step of one rank, in milliseconds. The parts do not overlap: waits are taken
    out of the ranges.
    """

    number: int
    wall: float
    """From the boundary before (for the first step: from its first event) to its own."""
    exposed: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RANGES, 0.0))
    waits: list[tuple[str, float]] = field(default_factory=list)
    """What it stood still for, and how long; together `exposed`."""

    @property
    def other(self) -> float:
        """Time outside all of them: the data loader, the caller's own code."""
        return self.wall - self.exposed - sum(self.parts.values())


@dataclass(frozen=True)
class Life:
    """One bucket in one pass; the three phases in milliseconds."""

    bucket: int
    filling: float
    queued: float
    in_flight: float
    args: dict[str, Any]


def read(path: str | Path) -> Recorded:
    """The events of one file. Raises `TraceError`."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON and UTF-8 alike
        raise TraceError(
            f"{path}: not complete JSON ({error}): cut short, or not a trace"
        ) from error
    try:
        about, events = document["otherData"], document["traceEvents"]
        recorded = Recorded(int(about["rank"]), int(about["dropped"]), list(events))
        complete = all(FIELDS[event["ph"]] <= event.keys() for event in recorded.events)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TraceError(f"{path}: JSON, but not a trace that zerort wrote ({reason})") from error
    if not complete:
        raise TraceError(
            f"{path}: JSON, but not a trace that zerort wrote (an event lacks a field of its phase)"
        )
    return recorded


def steps(events: Sequence[Event], *, dropped: int = 0) -> list[Step]:
    """The whole steps in `events`, by the instants that end them. With events `dropped` the first
    may lack some.
    """
    main = _track(events, MAIN)
    spans = sorted((e for e in events if e["ph"] == "X" and e["tid"] == main), key=_start)
    ends = sorted((e for e in events if e["ph"] == "i" and e["name"] == STEP), key=_start)
    if not ends:
        return []
    boundaries = [_start(end) for end in ends]
    starts = [min([boundaries[0], *map(_start, spans[:1])]), *boundaries]
    found = [
        Step(int(end["args"]["step"]), (boundary - start) / 1000)
        for end, boundary, start in zip(ends, boundaries, starts, strict=False)
    ]
    _charge(found, boundaries, spans)
    return found[1:] if dropped else found


def _charge(found: list[Step], boundaries: list[float], spans: list[Event]) -> None:
    """Adds each span to the step it ends in, and takes each wait out of the range around it."""
    around: Event | None = None
    for span in spans:
        at = bisect_left(boundaries, _end(span))
        if at == len(found):
            continue
        step, took = found[at], span["dur"] / 1000
        if span["name"] in RANGES:
            step.parts[span["name"]] += took
            around = span
        elif span["name"] == WAIT:
            step.exposed += took
            step.waits.append((str(span.get("args", {}).get("what", "")), took))
            if around is not None and _start(span) < _end(around):
                step.parts[around["name"]] -= took


def lives(events: Iterable[Event]) -> list[Life]:
    """Every bucket's lives, in the order in which they began."""
    begun: dict[str, dict[str, float]] = defaultdict(dict)
    lasted: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    about: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") != BUCKETS:
            continue
        key, name = event["id"], event["name"]
        if event["ph"] == "b":
            begun[key][name] = event["ts"]
            if "bucket" in event.get("args", {}):
                about[key] = event["args"]
        elif event["ph"] == "e" and name in begun[key]:
            lasted[key][name] = (event["ts"] - begun[key][name]) / 1000
    return [
        Life(
            args["bucket"],
            lasted[key]["filling"],
            lasted[key]["queued"],
            lasted[key]["in flight"],
            args,
        )
        for key, args in about.items()
    ]


def _track(events: Iterable[Event], name: str) -> int | None:
    for event in events:
        if event["name"] == "thread_name" and event["args"]["name"] == name:
            return int(event["tid"])
    return None


def _start(event: Event) -> float:
    return float(event["ts"])


def _end(span: Event) -> float:
    return float(span["ts"]) + float(span["dur"])
