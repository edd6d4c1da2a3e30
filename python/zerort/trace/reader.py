"""Trace files, read back: their steps and bucket lives as plain numbers.

Reads what `ChromeSink` writes and refuses anything else by name: another program's trace, another
version's. Of a file that breaks off it gives what stands before that. Times are milliseconds here.
Steps that are not whole (before the ring's memory, after the last boundary) are left out.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from zerort.errors import ZerortError
from zerort.trace.sink import BUCKETS, MAIN, PHASES, STEP, WAIT

__all__ = ["Event", "Life", "Recorded", "Step", "TraceError", "lives", "read", "steps"]

Event: TypeAlias = dict[str, Any]

FORMAT = 1
"""Of the files that are read, which is the core's `trace::FORMAT`."""
_HEAD = '{"displayTimeUnit":"ms","otherData":{"format":'

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
    """One rank's file."""

    rank: int
    dropped: int
    """Older events that the ring had forgotten."""
    events: list[Event]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is true of the whole run, by name."""
    cut: bool = False
    """Whether the file breaks off; then these are the events before that."""


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
    """One bucket in one pass: its moments on the axis of its rank, in milliseconds."""

    bucket: int
    first: float
    full: float
    launched: float
    landed: float
    retired: float
    args: dict[str, Any]

    @property
    def filling(self) -> float:
        """From the first gradient to the last."""
        return self.full - self.first

    @property
    def queued(self) -> float:
        """Full, and not launched."""
        return self.launched - self.full

    @property
    def in_flight(self) -> float:
        """From the launch until the result could be taken."""
        return self.landed - self.launched

    @property
    def summing(self) -> float:
        """Until the result had been taken."""
        return self.retired - self.landed

    @property
    def phases(self) -> tuple[float, float, float, float]:
        """As `PHASES` names them."""
        return self.filling, self.queued, self.in_flight, self.summing


def read(path: str | Path) -> Recorded:
    """The events of one file; of one that breaks off those before that. Raises `TraceError`."""
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        document = json.loads(text)
        cut = False
    except ValueError:
        document = _before_the_cut(path, text)
        cut = True
    try:
        about, events = document["otherData"], document["traceEvents"]
        _check_format(path, about)
        facts = dict(about.get("run", {}))
        recorded = Recorded(int(about["rank"]), int(about["dropped"]), list(events), facts, cut)
        complete = all(FIELDS[event["ph"]] <= event.keys() for event in recorded.events)
    except TraceError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TraceError(f"{path}: JSON, but not a trace that zerort wrote ({reason})") from error
    if not complete:
        raise TraceError(
            f"{path}: JSON, but not a trace that zerort wrote (an event lacks a field of its phase)"
        )
    return recorded


def _check_format(path: str | Path, about: Mapping[str, Any]) -> None:
    found = about.get("format", 0)
    if found != FORMAT:
        raise TraceError(
            f"{path}: a trace of format {found}, where this version of zerort reads {FORMAT}: "
            "read it with the version that wrote it"
        )


def _before_the_cut(path: str | Path, text: str) -> dict[str, Any]:
    """What stands whole in a file that breaks off: it has an event a line."""
    head, *lines = text.split("\n")
    if not text.startswith(_HEAD[: len(text)]) or not text:
        raise TraceError(f"{path}: no JSON, so not a trace")
    if not lines:
        raise TraceError(f"{path}: cut off before its first event: nothing of it can be shown")
    document: dict[str, Any] = json.loads(f"{head}]}}")
    for line in lines:
        try:
            document["traceEvents"].append(json.loads(line.removesuffix(",")))
        except ValueError:
            break
    return document


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
    lasted: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    since: dict[str, float] = {}
    about: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") != BUCKETS:
            continue
        key, name, at = event["id"], event["name"], event["ts"] / 1000
        if event["ph"] == "e":
            lasted[key][name] += at
            continue
        lasted[key][name] -= at
        if "bucket" in event.get("args", {}):
            about[key], since[key] = event["args"], at
    return [
        _life(args, since[key], lasted[key])
        for key, args in about.items()
        if min(lasted[key].values()) >= 0  # else its end was cut off
    ]


def _life(args: dict[str, Any], since: float, lasted: Mapping[str, float]) -> Life:
    first, full, launched, landed, retired = accumulate(
        (lasted.get(phase, 0.0) for phase in PHASES), initial=since
    )
    return Life(args["bucket"], first, full, launched, landed, retired, args)


def _track(events: Iterable[Event], name: str) -> int | None:
    for event in events:
        if event["name"] == "thread_name" and event["args"]["name"] == name:
            return int(event["tid"])
    return None


def _start(event: Event) -> float:
    return float(event["ts"])


def _end(span: Event) -> float:
    return float(span["ts"]) + float(span["dur"])
