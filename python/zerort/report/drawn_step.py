"""The section that draws the median step, rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from zerort.report.figures import Figures
from zerort.report.findings.pace import straggler
from zerort.report.lanes import ROW, Lanes
from zerort.report.overview import swatch
from zerort.report.page import Section
from zerort.report.svg import Scale
from zerort.report.words import count, ms

__all__ = ["axis_of", "ranks_shown", "step_section"]

MOST_RANKS, MOST_BUCKETS, MOST_SHAPES = 8, 40, 12_000
"""What is drawn at the most: ranks, buckets of each, and shapes altogether."""

_KEY = (
    ("filling", "a bucket fills"),
    ("queued", "is full, waits for its turn"),
    ("hidden", "is in flight"),
    ("flying", "is on the wire, hidden by compute"),
    ("exposed", "on the wire while the loop waits"),
    ("sums", "is summed"),
    ("publish", "parameters on the wire"),
    ("whole", "parameters whole (stage 3)"),
)


def step_section(figures: Figures) -> Section:
    """Lanes of each rank on one axis: the loop's row above, buckets below."""
    ranks = ranks_shown(figures)
    lanes = _lanes(figures, ranks)
    buckets = _buckets_shown(figures, lanes)
    words = (
        f"Step {figures.drawn} is the one of median length. Each rank has a strip for what its "
        "training loop did, and below it a row for each bucket in the order in which buckets "
        "leave: a bucket fills as gradients come, is in flight, and is summed. All ranks share one "
        "time axis; their clocks are aligned by the end of the vote, which all see at once."
    )
    body = "".join(
        _rank(rank, lanes[rank], [one for one in lanes[rank].order() if one in buckets], index < 2)
        for index, rank in enumerate(ranks)
    )
    hint = (
        '<p class="soft hover">Rest the pointer on a bar to read what it is.</p>'
        '<p class="soft touch">Touch a bar to read what it is.</p>'
    )
    title = f"The median step: {ms(figures.walls[figures.drawn])}"
    said = _left_out(figures, ranks, buckets, lanes)
    return Section(title, words, hint + _key(body) + said + body, "step")


def ranks_shown(figures: Figures) -> list[int]:
    """The first, the straggler, and others at even distances; all of them where they are few."""
    ranks = [rank.rank for rank in figures.run.ranks]
    if len(ranks) <= MOST_RANKS:
        chosen = ranks
    else:
        found = straggler(figures)
        wanted = [ranks[0]] + ([found[0]] if found else [])
        even = [ranks[at * (len(ranks) - 1) // (MOST_RANKS - 1)] for at in range(MOST_RANKS)]
        chosen = sorted(list(dict.fromkeys([*wanted, *even]))[:MOST_RANKS])
    return _straggler_first(chosen, figures)


def _straggler_first(ranks: list[int], figures: Figures) -> list[int]:
    found = straggler(figures)
    if found is None or found[0] not in ranks:
        return ranks
    return [found[0], *(rank for rank in ranks if rank != found[0])]


def _lanes(figures: Figures, ranks: Sequence[int]) -> dict[int, Lanes]:
    """On the axis that begins when the first rank begins."""
    number = figures.drawn
    every = {rank.rank: rank for rank in figures.run.ranks}
    steps = {rank: (every[rank].steps[number], every[rank].ahead[number]) for rank in every}
    start, end = axis_of(figures)
    scale = Scale(0.0, end - start)
    return {
        rank: Lanes(figures.run, steps[rank][0], scale, -start - steps[rank][1]) for rank in ranks
    }


def axis_of(figures: Figures) -> tuple[float, float]:
    """When the first rank begins the drawn step and the last one ends it, on the first's clock."""
    number = figures.drawn
    every = [(rank.steps[number], rank.ahead[number]) for rank in figures.run.ranks]
    return (
        min(step.start - ahead for step, ahead in every),
        max(step.end - ahead for step, ahead in every),
    )


def _buckets_shown(figures: Figures, lanes: dict[int, Lanes]) -> set[int]:
    """The dearest, as many as the page has room for."""
    every = {bucket for one in lanes.values() for bucket in one.order()}
    shapes = max((one.shapes() for one in lanes.values()), default=0) * len(lanes)
    room = min(MOST_BUCKETS, int(len(every) * MOST_SHAPES / max(shapes, 1)))
    dearest = [bucket.bucket for bucket in figures.buckets if bucket.bucket in every]
    return set(dearest[: max(room, 4)])


def _left_out(
    figures: Figures, ranks: Sequence[int], buckets: set[int], lanes: dict[int, Lanes]
) -> str:
    every = {bucket for one in lanes.values() for bucket in one.order()}
    said = []
    if len(ranks) < len(figures.run.ranks):
        said.append(f"{len(ranks)} of {len(figures.run.ranks)} ranks are drawn")
    if len(buckets) < len(every):
        said.append(f"{len(buckets)} of {len(every)} buckets are drawn, those that cost most")
    return f'<p class="loss">Sampled: {"; ".join(said)}.</p>' if said else ""


def _rank(rank: int, lanes: Lanes, buckets: Sequence[int], is_open: bool) -> str:
    names = "".join(
        f'<div style="height:{ROW}px;line-height:{ROW + 1}px">b{bucket}</div>' for bucket in buckets
    )
    rows = (
        f'<div class="lanes"><div class="names">{names}</div><div>{lanes.buckets(buckets)}</div>'
        "</div>"
        if buckets
        else ""
    )
    strip = f'<div class="lanes"><div class="names"></div><div>{lanes.loop()}</div></div>'
    counted = count(len(buckets), "bucket", "buckets")
    return (
        f"<details{' open' if is_open else ''}><summary><b>rank {rank}</b> "
        f'<span class="soft">{counted}</span>{strip}</summary>{rows}</details>'
    )


def _key(body: str) -> str:
    """Of the colours that there are."""
    items = "".join(
        f"<li>{swatch(colour)}{escape(words)}</li>"
        for colour, words in _KEY
        if f'class="{colour}"' in body
    )
    return f'<ul class="legend soft">{items}</ul>'
