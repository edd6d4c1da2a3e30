"""The page: a prediction's curves over the number of ranks, below the report of the run that it was
made from, or by themselves for a model that nobody has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from zerort.forecast.table import size
from zerort.report import report
from zerort.report.curves import Series, scaling
from zerort.report.page import Section, document, table
from zerort.report.run import load
from zerort.simulate.scales import FIXED, Point
from zerort.simulate.subject import Subject

__all__ = ["sections", "write_page"]

_CHOSEN = "chosen"


def write_page(
    out: Path, subject: Subject, points: Sequence[Point], notes: Sequence[str], trace: str | None
) -> Path:
    """Writes the page; `trace` is the file that the subject was read from. Raises `OSError`."""
    found = sections(subject, points, notes)
    if trace is not None:
        return report.write_report(load([trace]), out, found)
    return report.write_page(document(f"{subject.name}, predicted", found), out)


def sections(
    subject: Subject, points: Sequence[Point], notes: Sequence[str]
) -> tuple[Section, ...]:
    """Step, communication and memory over the ranks."""
    return (
        _steps(subject, points, notes),
        _communication(points),
        _memory(points),
    )


def _memory(points: Sequence[Point]) -> Section:
    most = max((point.memory_nbytes for point in points), default=0)
    unit, scale = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    series = [_curve(_CHOSEN, points, lambda point: point.memory_nbytes / scale)]
    words = "States and what is in flight, without activations."
    return scaling("Memory of a rank", words, series, unit=unit)


def _steps(subject: Subject, points: Sequence[Point], notes: Sequence[str]) -> Section:
    compute = (subject.forward_ns + subject.backward_ns) * subject.micro_batches / 1e6
    series = [_curve(_CHOSEN, points, lambda point: point.step_ms)]
    series += [_fixed(fixed.name, points) for fixed in FIXED]
    series.append(_curve("compute", points, lambda point: compute))
    if subject.measured is not None:
        ranks, step = subject.measured
        words = f"measured: {step:.1f} ms on {ranks} ranks, on the wire that it ran on"
        series.append(Series("measured", [(ranks, step)], measured=True, note=words))
    words = (
        "With the bucket size that the cost model chooses for each number of ranks, and with the "
        "fixed ones of DDP and DeepSpeed."
    )
    drawn = scaling("A step, predicted", words, series)
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return Section(drawn.title, drawn.words, f"{drawn.body}<ul>{said}</ul>", drawn.anchor)


def _communication(points: Sequence[Point]) -> Section:
    series = [
        _curve("exposed", points, lambda point: point.exposed_ms),
        _curve("publish", points, lambda point: point.publish_ms),
        _curve("vote", points, lambda point: point.vote_ms),
    ]
    words = (
        "What a rank stands still for; what hides behind a backward or, where updated parameters "
        "overlap, behind the next forward is not in it."
    )
    drawn = scaling("Communication, predicted", words, series)
    heads = [(name, "") for name in ("ranks", "buckets", "longest", "under way", "sent")]
    rows = [
        (
            str(point.ranks),
            str(point.buckets),
            size(point.bucket_nbytes),
            "all" if point.window is None else str(point.window),
            size(point.sent_nbytes),
        )
        for point in points
    ]
    return Section(drawn.title, drawn.words, drawn.body + table(heads, rows), drawn.anchor)


def _curve(name: str, points: Sequence[Point], value: Callable[[Point], float]) -> Series:
    return Series(name, [(point.ranks, value(point)) for point in points])


def _fixed(name: str, points: Sequence[Point]) -> Series:
    return _curve(name, points, lambda point: point.fixed[name])
