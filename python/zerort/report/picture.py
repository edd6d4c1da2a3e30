"""The first page as a PNG, for where HTML cannot go: the split of a step, what stands out, and the
median step of a few ranks. Drawn by matplotlib, which only this needs.
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zerort.errors import ConfigError
from zerort.report.drawn_step import axis_of, ranks_shown
from zerort.report.figures import Figures
from zerort.report.findings import findings
from zerort.report.lanes import colour_of
from zerort.report.overview import facts_line, headline
from zerort.report.timeline import RankStep
from zerort.report.words import KIND_NAMES, ms, percent

__all__ = ["write_picture"]

COLOURS: Mapping[str, str] = {
    "forward": "#c3c9d1",
    "backward": "#9aa4b1",
    "exposed": "#d1400f",
    "sums": "#7c4a24",
    "vote": "#8250c4",
    "optimizer": "#2f8f4e",
    "publish": "#2272b8",
    "engine": "#b9b2a6",
    "outside": "#e6e3dc",
    "feature": "#a9895a",
    "filling": "#dfe2e6",
    "hidden": "#f6d9c3",
    "flying": "#eb9a5c",
    "whole": "#bcd9ef",
}
"""The page's, in light."""

_LETTERS = 150
"""That fit into the whole width."""
_MOST_RANKS, _MOST_BUCKETS, _MOST_FINDINGS = 2, 16, 3


def write_picture(found: Figures, out: Path) -> Path:
    """Raises `ConfigError` without matplotlib, and `OSError`."""
    drawing = _matplotlib(out)
    ranks = ranks_shown(found)[:_MOST_RANKS]
    lines = findings(found)[:_MOST_FINDINGS]
    sheet = drawing.Figure(figsize=(11, 4.2 + 0.75 * len(lines) + 2.6 * len(ranks)), dpi=110)
    ratios = [1.0, 0.2 + 1.0 * len(lines), *[3.2] * len(ranks)]
    axes = sheet.subplots(len(ratios), 1, gridspec_kw={"height_ratios": ratios, "hspace": 0.55})
    sheet.suptitle(headline(found), x=0.06, y=0.975, ha="left", fontsize=15, weight="bold")
    sheet.text(0.06, 0.94, facts_line(found), fontsize=9, color="#5c6168", va="top")
    _split(axes[0], found)
    _words(axes[1], [(ms(one.cost) if one.cost else "", one.words) for one in lines])
    for rank, axis in zip(ranks, axes[2:], strict=True):
        _lanes(axis, found, rank)
    sheet.subplots_adjust(left=0.06, right=0.97, top=0.88, bottom=0.06)
    sheet.savefig(out, format="png")
    return out


def _matplotlib(out: Path) -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(
            f"{out}: a PNG is drawn by matplotlib, which cannot be imported ({error}): pip install "
            '"zerort[report]", or do without --png: the HTML page needs nothing'
        ) from error


def _bare(axis: Any) -> None:
    axis.set_yticks([])
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=8, colors="#5c6168")


def _split(axis: Any, found: Figures) -> None:
    _bare(axis)
    at, wall = 0.0, found.split.wall
    for kind, took in found.split.by_kind().items():
        named = KIND_NAMES.get(kind, kind)
        axis.barh(0, took, left=at, height=0.8, color=COLOURS[colour_of(kind)], label=named)
        name = f"{named}\n{ms(took)}, {percent(took, wall)}"
        if took / wall * _LETTERS > max(map(len, name.split("\n"))):
            dark = kind in ("exposed", "vote", "publish", "optimizer", "sums")
            colour = "white" if dark else "#1d1f22"
            axis.text(at + took / 2, 0, name, ha="center", va="center", fontsize=8, color=colour)
        at += took
    axis.set_xlim(0, wall)
    axis.set_xlabel("ms of a typical step", fontsize=8, color="#5c6168")
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(-0.005, 0.98),
        ncols=9,
        fontsize=8,
        frameon=False,
        borderpad=0,
        columnspacing=1.2,
        handlelength=0.8,
        handleheight=0.8,
    )


def _words(axis: Any, lines: Sequence[tuple[str, str]]) -> None:
    axis.axis("off")
    for index, (cost, words) in enumerate(lines):
        y = 1 - index / max(len(lines), 1)
        axis.text(0.0, y, cost, fontsize=11, weight="bold", va="top", transform=axis.transAxes)
        wrapped = textwrap.fill(words, 118)
        axis.text(0.1, y, wrapped, fontsize=9, va="top", transform=axis.transAxes)


def _lanes(axis: Any, found: Figures, rank: int) -> None:
    _bare(axis)
    step = next(one for one in found.run.ranks if one.rank == rank).steps[found.drawn]
    start, end = axis_of(found)
    start += next(one for one in found.run.ranks if one.rank == rank).ahead[found.drawn]
    for part in step.slices:
        axis.barh(0, part.took, left=part.start - start, height=0.9, color=_colour(part.kind))
    order = list(dict.fromkeys(life.bucket for life in sorted(step.lives, key=_launched)))
    rows = {bucket: -1 - index for index, bucket in enumerate(order[:_MOST_BUCKETS])}
    for bucket, since, until, colour, height in _bars(step):
        if bucket in rows:
            left, took = since - start, until - since
            axis.barh(rows[bucket], took, left=left, height=height, color=COLOURS[colour])
    axis.set_yticks([0, *rows.values()], ["loop", *(f"b{bucket}" for bucket in rows)])
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.set_xlim(0, end - axis_of(found)[0])
    shown = f", {len(rows)} of {len(order)} buckets" if len(rows) < len(order) else ""
    axis.set_title(f"rank {rank}, step {found.drawn}{shown}", fontsize=9, loc="left")


def _bars(step: RankStep) -> Iterator[tuple[int, float, float, str, float]]:
    for whole in step.wholes:
        yield from ((bucket, whole.start, whole.end, "whole", 0.8) for bucket in whole.buckets)
    for life in step.lives:
        yield life.bucket, life.first, life.full, "filling", 0.5
        yield life.bucket, life.full, life.retired, "hidden", 0.5
    for one in step.collectives:
        colour = "publish" if one.operation == "all_gather" else "flying"
        yield one.bucket, one.start, one.end, colour, 0.8


def _colour(kind: str) -> str:
    return COLOURS[colour_of(kind)]


def _launched(life: Any) -> float:
    return float(life.launched)
