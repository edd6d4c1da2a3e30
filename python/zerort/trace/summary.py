"""What a run spent its time on: tables over trace files, and the four-line account of a step.

Exposed communication is the time the main track stood still for a collective; communication that
compute hides does not count. A figure over several steps, lives or ranks is a median unless it says
otherwise.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from zerort.terminal import Answer, shown, track
from zerort.trace.reader import Event, Life, Recorded, Step, TraceError, lives, read, steps
from zerort.trace.sink import PHASES

__all__ = [
    "Account",
    "TraceError",
    "account",
    "bucket_table",
    "step_table",
    "summarise",
    "wait_table",
]

_NUMBER = re.compile(r" \d.*")
"""Which bucket or unit, and its parameters."""


@dataclass(frozen=True)
class Account:
    """A median step of one rank: milliseconds of each part and of the whole, as text four lines."""

    compute: float
    """Forward and backward, without what they waited."""
    exposed: float
    optimizer: float
    publish: float
    wall: float
    """Boundary to boundary: also what lies outside the four."""

    def __str__(self) -> str:
        rows = {
            "compute": self.compute,
            "exposed communication": self.exposed,
            "optimizer": self.optimizer,
            "publish": self.publish,
        }
        return "\n".join(
            f"{name:<21} {ms:9.2f} ms {_share(ms, self.wall):>6}" for name, ms in rows.items()
        )


def account(events: Sequence[Event], *, dropped: int = 0) -> Account:
    """The account of the median step, the first one left out when there are others: it is slower
    than all that follow.

    `events` is the `traceEvents` of one rank's file. Raises `TraceError` when they hold no whole
    step.
    """
    found = steps(events, dropped=dropped)
    found = found[1:] or found
    if not found:
        raise TraceError("the trace holds no whole step")
    return Account(
        compute=median(step.parts["forward"] + step.parts["backward"] for step in found),
        exposed=median(step.exposed for step in found),
        optimizer=median(step.parts["optimizer"] for step in found),
        publish=median(step.parts["publish"] for step in found),
        wall=median(step.wall for step in found),
    )


def summarise(paths: Sequence[str | Path], *, last: int = 10) -> Answer:
    """The tables of the ranks whose files are given, with the `last` steps of each. Raises
    `TraceError`.
    """
    ranks = sorted((read(path) for path in track(paths, "reading")), key=lambda one: one.rank)
    by_rank: dict[int, list[Step]] = {}
    for recorded in ranks:
        if recorded.rank in by_rank:
            raise TraceError(
                f"rank {recorded.rank} is in two of the files: give the files of one run, one of "
                "each rank"
            )
        by_rank[recorded.rank] = steps(recorded.events, dropped=recorded.dropped)
    every = [step for found in by_rank.values() for step in found]
    exposed, wall = sum(step.exposed for step in every), sum(step.wall for step in every)
    counts = f"steps: {len(every)}, ranks: {len(ranks)}"
    share = f"exposed communication: {_share(exposed, wall)} of the time ({counts})"
    found = [life for recorded in ranks for life in lives(recorded.events)]
    tables = (bucket_table(found), "", step_table(by_rank, last), "", wait_table(every), "")
    document = {
        "exposed_share": exposed / wall if wall else None,
        "ranks": [
            {
                "rank": one.rank,
                "forgotten_events": one.dropped,
                "cut": one.cut,
                "steps": [_step(step) for step in by_rank[one.rank]],
                "buckets": [_life(life) for life in lives(one.events)],
            }
            for one in ranks
        ],
    }
    status = int(any(one.cut for one in ranks))
    return Answer(document, shown(*tables, share, *_lost(ranks)), status)


def _step(step: Step) -> dict[str, Any]:
    """Of a document; `ms` are milliseconds."""
    waits = [{"waited_for": what, "ms": took} for what, took in step.waits]
    parts = {f"{name}_ms": took for name, took in step.parts.items()}
    whole = {"exposed_ms": step.exposed, "other_ms": step.other, "wall_ms": step.wall}
    return {"step": step.number, **parts, **whole, "waits": waits}


def _life(life: Life) -> dict[str, Any]:
    phases = {
        f"{name.replace(' ', '_')}_ms": took for name, took in zip(PHASES, life.phases, strict=True)
    }
    return {"bucket": life.bucket, **phases, **life.args}


def bucket_table(found: Iterable[Life]) -> Table:
    """A row for each bucket, over all its lives."""
    table = _table("Buckets: median ms, and the parameter that most often comes last")
    for heading in ("bucket", "launches", "bytes", *PHASES):
        table.add_column(heading, justify="right")
    table.add_column("last", overflow="fold")
    grouped: dict[int, list[Life]] = defaultdict(list)
    for life in found:
        grouped[life.bucket].append(life)
    for bucket, group in sorted(grouped.items()):
        phases = (life.phases for life in group)
        table.add_row(
            str(bucket),
            str(len(group)),
            f"{group[-1].args['bytes']:,}" if "bytes" in group[-1].args else "",
            *(f"{median(phase):.2f}" for phase in zip(*phases, strict=True)),
            Text(
                _most_often(group, "last")
            ),  # a name may hold brackets, which are markup in a plain string
        )
    return table


def step_table(by_rank: dict[int, list[Step]], last: int) -> Table:
    """For each rank its `last` steps and the median of all of them."""
    table = _table("Steps: ms, and the exposed share of all")
    for heading in (
        "rank",
        "step",
        "forward",
        "backward",
        "exposed",
        "optimizer",
        "publish",
        "other",
        "all",
        "exposed %",
    ):
        table.add_column(heading, justify="right")
    for rank, found in by_rank.items():
        shown = found[-last:] if last else []
        for step in shown:
            table.add_row(str(rank), str(step.number), *_cells(_columns(step)))
        if found:
            middle = [median(column) for column in zip(*map(_columns, found), strict=True)]
            table.add_row(str(rank), "median", *_cells(middle), style="bold", end_section=True)
    return table


def wait_table(found: Sequence[Step]) -> Table:
    """A row for each kind of thing that steps stood still for, the longest first: the gathers of
    stage 3 apart from the sums.
    """
    table = _table("Waits: of a step, on average")
    for heading in ("waited for", "times", "ms", "of exposed"):
        table.add_column(heading, justify="left" if heading == "waited for" else "right")
    kinds: dict[str, list[float]] = defaultdict(list)
    for step in found:
        for what, took in step.waits:
            kinds[_NUMBER.sub("", what)].append(took)
    exposed = sum(step.exposed for step in found)
    for kind, times in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        each = len(times) / len(found), sum(times) / len(found)
        table.add_row(Text(kind), f"{each[0]:.1f}", f"{each[1]:.2f}", _share(sum(times), exposed))
    return table


def _table(title: str) -> Table:
    """As narrow as can be: the steps fit a terminal of 80 columns."""
    return Table(title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)


def _columns(step: Step) -> list[float]:
    parts = step.parts
    return [
        parts["forward"],
        parts["backward"],
        step.exposed,
        parts["optimizer"],
        parts["publish"],
        step.other,
        step.wall,
    ]


def _cells(columns: Sequence[float]) -> list[str]:
    return [*(f"{ms:.2f}" for ms in columns), _share(columns[2], columns[-1])]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _most_often(group: Iterable[Life], arg: str) -> str:
    named = Counter(life.args[arg] for life in group if life.args.get(arg))
    return ", ".join(f"{name} ({count}x)" for name, count in named.most_common(1))


def _lost(ranks: Iterable[Recorded]) -> list[str]:
    cut = [
        f"rank {recorded.rank}: its file breaks off; this is what stands before that"
        for recorded in ranks
        if recorded.cut
    ]
    return cut + [
        f"rank {recorded.rank}: {recorded.dropped:,} older events were forgotten; raise "
        "zerort.trace.capacity"
        for recorded in ranks
        if recorded.dropped
    ]
