"""A checker of Chrome's trace event format: what a viewer needs of each phase, and of the file as a
whole.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

FIELDS = {
    "X": {"ts": float, "dur": float},
    "i": {"ts": float, "s": str},
    "C": {"ts": float, "args": dict},
    "M": {"args": dict},
    "b": {"ts": float, "cat": str, "id": str},
    "e": {"ts": float, "cat": str, "id": str},
}
METADATA = {
    "process_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
FLOAT_STEP_US = 0.02
"""How far apart two 64-bit floats can be at the microseconds of a decade, with room."""


def check_file(path: str | Path) -> list[dict[str, Any]]:
    """The events of a file, after every rule was found kept. Raises `AssertionError`."""
    events = json.loads(Path(path).read_text(), parse_constant=_not_json)["traceEvents"]
    check(events)
    return events


def check(events: list[dict[str, Any]]) -> None:
    for event in events:
        check_fields(event)
    check_order(events)
    check_tracks(events)
    check_async(events)
    check_nesting(events)


def check_fields(event: dict[str, Any]) -> None:
    assert event.get("ph") in FIELDS, f"unknown phase: {event}"
    for field, kind in {"name": str, "pid": int, "tid": int, **FIELDS[event["ph"]]}.items():
        value = event.get(field)
        allowed = (int, float) if kind is float else kind
        assert isinstance(value, allowed) and not isinstance(value, bool), f"{field} of {event}"
    assert math.isfinite(event.get("ts", 0.0)), f"ts of {event}"
    assert event.get("dur", 0.0) >= 0, f"dur of {event}"
    assert event["ph"] != "i" or event["s"] in {"g", "p", "t"}, f"scope of {event}"
    assert isinstance(event.get("args", {}), dict), f"args of {event}"
    if event["ph"] == "C":
        assert event["args"] and all(
            type(value) in (int, float) for value in event["args"].values()
        ), event
    if event["ph"] == "M":
        field, kind = METADATA[event["name"]]
        assert type(event["args"][field]) is kind, event


def check_order(events: list[dict[str, Any]]) -> None:
    times = [event["ts"] for event in events if "ts" in event]
    assert times == sorted(times), "events are not in order of time"


def check_tracks(events: list[dict[str, Any]]) -> None:
    """Every process and every row that is used has a name."""
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {e["pid"] for e in events} == {e["pid"] for e in events if e["name"] == "process_name"}
    used = {(e["pid"], e["tid"]) for e in events if e["ph"] in "Xibe"}
    assert used <= named, f"rows without a name: {used - named}"


def check_async(events: list[dict[str, Any]]) -> None:
    """Begins and ends of one category and id balance like brackets."""
    open_spans: dict[tuple[str, str], list[str]] = defaultdict(list)
    for event in events:
        if event["ph"] == "b":
            open_spans[event["cat"], event["id"]].append(event["name"])
        if event["ph"] == "e":
            stack = open_spans[event["cat"], event["id"]]
            assert stack and stack.pop() == event["name"], f"an end without its begin: {event}"
    assert not any(open_spans.values()), f"begins without an end: {dict(open_spans)}"


def check_nesting(events: list[dict[str, Any]]) -> None:
    """Spans of one row lie inside one another or apart, as a stack of calls does."""
    stacks: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in events:
        if event["ph"] != "X":
            continue
        stack, start, end = (
            stacks[event["pid"], event["tid"]],
            event["ts"],
            event["ts"] + event["dur"],
        )
        while stack and stack[-1] <= start + FLOAT_STEP_US:
            stack.pop()
        assert not stack or end <= stack[-1] + FLOAT_STEP_US, (
            f"reaches out of the span around it: {event}"
        )
        stack.append(end)


def _not_json(word: str) -> float:
    raise AssertionError(f"{word} is not JSON")
