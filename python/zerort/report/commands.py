"""`zerort trace`: its commands and their arguments."""

from __future__ import annotations

import argparse
from glob import glob
from pathlib import Path

from zerort.report.diff import compare, difference
from zerort.report.figures import figures
from zerort.report.findings import findings
from zerort.report.picture import write_picture
from zerort.report.report import page_of, write_page
from zerort.report.run import load, trace_files
from zerort.terminal import Answer, Commands, add_command, count, progress, shown
from zerort.trace.reader import TraceError
from zerort.trace.summary import summarise

__all__ = ["add_trace_commands"]


def add_trace_commands(commands: Commands) -> None:
    """Adds them to a command line."""
    summary = add_command(
        commands,
        "summary",
        _summary,
        help="where the time of a run went: tables of buckets and steps",
        example="zerort trace summary trace-0.json trace-1.json",
    )
    summary.add_argument(
        "files", nargs="+", metavar="FILE", help="trace files of one run, one for each rank"
    )
    summary.add_argument(
        "--steps",
        type=count,
        default=10,
        metavar="N",
        help="steps listed for each rank (default 10)",
    )
    report = add_command(
        commands,
        "report",
        _report,
        help="one page that explains where a step's time goes, with findings and remedies",
        example="zerort trace report trace-0.json trace-1.json -o report.html",
    )
    report.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="trace files of one run, or their folder",
    )
    report.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="HTML",
        help="the page to write (default report.html)",
    )
    report.add_argument(
        "--png",
        action="store_true",
        help="also draw the first page beside it, as a PNG; needs zerort[report]",
    )
    diff = add_command(
        commands,
        "diff",
        _diff,
        help="what changed between two runs: the step, its parts, and each bucket",
        example="zerort trace diff before/ after/",
    )
    for name, words in (
        ("before", "a folder of trace files, one file, or a pattern in quotes"),
        ("after", "another run's"),
    ):
        diff.add_argument(name, type=Path, metavar=name.upper(), help=words)


def _summary(args: argparse.Namespace) -> Answer:
    return summarise(args.files, last=args.steps)


def _report(args: argparse.Namespace) -> Answer:
    with progress("reading traces"):
        if any(_is_same(args.out, path) for path in trace_files(args.files)):
            raise TraceError(f"{args.out}: is one of the traces: name another file for the page")
        found = figures(load(args.files))
        # what may lack a package comes first: then either both are written, or none
        written = [write_picture(found, args.out.with_suffix(".png"))] if args.png else []
        written.insert(0, write_page(page_of(found), args.out))
    named = " and ".join(map(str, written))
    if found.run.losses:
        raise TraceError(f"{'; '.join(found.run.losses)}. {named} has what could be read")
    said = findings(found)
    document = {
        "written": written,
        "step_ms": found.split.wall,
        "parts_ms": found.split.by_kind(),
        "findings": said,
    }
    lines = [f"  {one.words}" for one in said[:3]]
    return Answer(document, shown(named, *lines))


def _is_same(out: Path, path: Path) -> bool:
    return out.exists() and path.exists() and out.samefile(path)


def _diff(args: argparse.Namespace) -> Answer:
    with progress("reading traces"):
        runs = [load(_files(path)) for path in (args.before, args.after)]
    for path, run in zip((args.before, args.after), runs, strict=True):
        if run.losses:
            raise TraceError(f"{path}: {'; '.join(run.losses)}: the runs cannot be compared")
    found = difference(*map(figures, runs))
    return Answer(found, shown(*compare(found)))


def _files(given: Path) -> list[Path]:
    """What a pattern stands for, where there is no file of that name."""
    found = [] if given.exists() else sorted(map(Path, glob(str(given))))
    return found or [given]
