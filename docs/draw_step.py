"""Draws one step of a trace as an SVG: what the training loop did, and below it the life of every
bucket.

    python docs/draw_step.py runs/train_text/trace-0.json --step 10 --out docs/step.svg

A bucket's bar has four parts: it fills (first to last gradient), is queued (full, but its turn has
not come), is in flight (launched, its result not yet taken), and is summed. The strong bars within
are its collectives, from start to completion: below the upper row's backward they cost no time.

At stage 3 there is a row for each unit instead, in the order of the forward: a pale bar is how long
it has memory, from its gather to its free, and its buckets' collectives lie in the same row.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from zerort.trace.reader import Event, read
from zerort.trace.sink import BUCKETS, STEP

WIDTH, LEFT, ROW, BAR = 960, 90, 26, 18
THINNEST = 0.3

COLOURS = {
    "forward": "#4c78a8",
    "backward": "#72b7b2",
    "wait": "#e45756",
    "optimizer": "#54a24b",
    "publish": "#b279a2",
    "whole": "#cfe3c9",
    "filling": "#d5dbe3",
    "queued": "#f2cf5b",
    "in flight": "#fde3c8",
    "summing": "#b07a3f",
    "reduce_scatter": "#f58518",
    "all_gather": "#9d755d",
}

ROUND = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
ON_TOP = {"wait", "reduce_scatter", "all_gather"}


@dataclass(frozen=True)
class Bar:
    """A coloured stretch of a row; microseconds."""

    row: str
    name: str
    start: float
    end: float


def bars(events: list[Event], number: int) -> list[Bar]:
    """Everything that step `number` is drawn of. Raises `ValueError` for a step without a whole
    step before it.
    """
    ends = {
        event["args"]["step"]: event["ts"]
        for event in events
        if event["name"] == STEP and event["ph"] == "i"
    }
    if number not in ends or number - 1 not in ends:
        raise ValueError(
            f"step {number} is not whole in this trace: it has boundaries {min(ends)} to "
            f"{max(ends)}"
        )
    since, until = ends[number - 1], ends[number]
    spans = [
        Bar("loop", event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X" and event["name"] in COLOURS and event["name"] != "whole"
    ]
    whole, unit_of = units(events)
    found = (
        *spans,
        *whole,
        *(bar for bar in phases(events) if bar.row not in unit_of),
        *(replace(bar, row=unit_of.get(bar.row, bar.row)) for bar in collectives(events)),
    )
    return [bar for bar in found if since <= bar.start and bar.end <= until]


def units(events: list[Event]) -> tuple[list[Bar], dict[str, str]]:
    """How long each unit has memory, and the row of the unit for that of each of its buckets."""
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X" and event["name"] == "whole"]
    bars = [
        Bar(tracks[event["tid"]], "whole", event["ts"], event["ts"] + event["dur"])
        for event in spans
    ]
    rows = {
        f"bucket {bucket[1:]}": tracks[event["tid"]]
        for event in spans
        for bucket in event["args"]["buckets"].split()
    }
    return bars, rows


def phases(events: Iterable[Event]) -> list[Bar]:
    """The phases of all buckets' lives, from async begin and end events that share an id."""
    rows: dict[str, str] = {}
    open_since: dict[tuple[str, str], float] = {}
    found = []
    for event in (event for event in events if event.get("cat") == BUCKETS):
        key = event["id"], event["name"]
        if event["name"] not in COLOURS:
            rows[event["id"]] = event["name"]
        elif event["ph"] == "b":
            open_since[key] = event["ts"]
        else:
            found.append(Bar(rows[event["id"]], event["name"], open_since.pop(key), event["ts"]))
    return found


def collectives(events: Iterable[Event]) -> list[Bar]:
    """What was on the wire, in the row of its bucket: spans are named `reduce_scatter b3`."""
    found = []
    for event in (event for event in events if event["ph"] == "X"):
        operation, _, bucket = event["name"].partition(" b")
        if operation in COLOURS and bucket:
            found.append(
                Bar(f"bucket {bucket}", operation, event["ts"], event["ts"] + event["dur"])
            )
    return found


def svg(drawn: list[Bar]) -> str:
    """The picture: a row for the loop, a row for each bucket in the order of launch, a time axis, a
    legend.
    """
    start, end = min(bar.start for bar in drawn), max(bar.end for bar in drawn)
    scale = (WIDTH - LEFT - 10) / (end - start)
    tops: dict[str, int] = defaultdict(lambda: len(tops) * ROW + 10)
    shapes = []
    for bar in sorted(drawn, key=lambda bar: (bar.row != "loop", bar.name in ON_TOP, bar.start)):
        x, width = LEFT + (bar.start - start) * scale, (bar.end - bar.start) * scale
        if width < THINNEST:
            continue
        told = f"{bar.name}, {(bar.end - bar.start) / 1000:.2f} ms"
        shapes.append(
            f'<rect x="{x:.1f}" y="{tops[bar.row]}" width="{width:.1f}" height="{BAR}" '
            f'fill="{COLOURS[bar.name]}"><title>{escape(told)}</title></rect>'
        )
    labels = [text(LEFT - 8, top + 13, row, "end") for row, top in tops.items()]
    foot = len(tops) * ROW + 24
    key = legend(foot + 14, {bar.name for bar in drawn})
    body = "\n".join([*axis((end - start) / 1000, foot), *shapes, *labels, *key])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {foot + 52}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def axis(milliseconds: float, foot: int) -> list[str]:
    """About ten lines from top to foot, at a round distance, with their times."""
    distance = next(step for step in ROUND if step * 12 >= milliseconds or step == ROUND[-1])
    lines = []
    for time in range(0, int(milliseconds) + 1, distance):
        x = LEFT + time / milliseconds * (WIDTH - LEFT - 10)
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{foot - 14}" stroke="#e8e8e8"/>')
        lines.append(text(x, foot, f"{time} ms" if time == 0 else str(time), "middle"))
    return lines


def legend(top: int, drawn: Set[str]) -> list[str]:
    """What each colour means."""
    parts = []
    x = LEFT
    for name, colour in COLOURS.items():
        if name not in drawn:
            continue
        if x > WIDTH - 40 - 6 * len(name):
            x, top = LEFT, top + 18
        parts += [
            f'<rect x="{x}" y="{top}" width="12" height="12" fill="{colour}"/>',
            text(x + 17, top + 11, name),
        ]
        x += 40 + 6 * len(name)
    return parts


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(content)}</text>'


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw one step of a trace as an SVG.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--step", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("step.svg"))
    args = parser.parse_args()
    args.out.write_text(svg(bars(read(args.trace).events, args.step)))


if __name__ == "__main__":
    main()
