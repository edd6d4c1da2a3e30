"""The sections below the picture of a step: buckets by what they cost, ranks side by side, every
step of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from zerort.report.buckets import BucketCost
from zerort.report.figures import Figures
from zerort.report.findings.pace import straggler
from zerort.report.overview import split_bar
from zerort.report.page import Section, figure, table
from zerort.report.split import COMPUTE
from zerort.report.svg import Scale, bar, dot, line, picture, text, ticks
from zerort.report.words import KIND_WORDS, amount, ms

__all__ = ["buckets_section", "ranks_section", "steps_section"]

MOST_ROWS, MOST_RANKS, MOST_STEPS = 40, 32, 600
_CHART, _FOOT = 170, 22


def buckets_section(figures: Figures) -> Section | None:
    """None for a run without buckets, as one that only runs forward is."""
    if not figures.buckets:
        return None
    shown = figures.buckets[:MOST_ROWS]
    longest = max(bucket.cost for bucket in shown)
    heads = (
        ("bucket", "name"),
        ("costs, ms", ""),
        ("", "bars"),
        ("sends", ""),
        ("fills", ""),
        ("waits", ""),
        ("flies", ""),
        ("is summed", ""),
        ("comes last", "name"),
    )
    words = (
        "A bucket costs the time of a step for which ranks stood still for its sum (orange) or for "
        "its parameters (blue). The other times are those of one launch, in milliseconds; what "
        "flies while the backward goes on is free."
    )
    rows = [_bucket(bucket, longest) for bucket in shown]
    rest = len(figures.buckets) - len(shown)
    said = f'<p class="loss">Sampled: {rest} cheaper buckets are left out.</p>' if rest else ""
    return Section("Buckets, by what they cost", words, table(heads, rows) + said, "buckets")


def _bucket(bucket: BucketCost, longest: float) -> list[str]:
    scale = Scale(0.0, longest or 1.0)
    shapes = []
    at = 0.0
    for kind, took, why in (
        ("exposed", bucket.exposed, "for its sum"),
        ("publish", bucket.gathered, "for its parameters, at stage 3"),
        ("publish", bucket.published, "for its updated parameters"),
    ):
        if took:
            hint = f"bucket {bucket.bucket}: {ms(took)} a step {why}"
            shapes.append(bar(scale, at, at + took, 3, 11, kind, hint))
        at += took
    times = f" x {bucket.launches:.0f}" if bucket.launches > 1.5 else ""
    is_late = bucket.alone >= max(1.0, bucket.filling / 2)
    alone = f' <span class="soft">(alone for {ms(bucket.alone)})</span>' if is_late else ""
    return [
        f"<b>{bucket.bucket}</b> <span class=soft>{_named(bucket.contents)}</span>",
        f"{bucket.cost:.2f}",
        picture(17, shapes, f"what bucket {bucket.bucket} costs"),
        f"{amount(bucket.size)} {escape(bucket.dtype)}{times}",
        f"{bucket.filling:.1f}",
        f"{bucket.queued:.1f}",
        f"{bucket.in_flight:.1f}",
        f"{bucket.summing:.2f}",
        _named(bucket.last) + alone if bucket.last else "",
    ]


def _named(parameter: str) -> str:
    """HTML of a name, which may be broken behind its dots."""
    return re.sub(r"\.(?=\w)", ".<wbr>", escape(parameter))


def ranks_section(figures: Figures) -> Section | None:
    """None for one rank."""
    if len(figures.ranks) < 2:
        return None
    slow = straggler(figures)
    if slow is None:
        said = "No rank is slower than the others in most steps."
    else:
        rank, kind, longer, times = slow
        said = (
            f"Rank {rank} is the straggler: it is {100 * (times - 1):.0f} % slower "
            f"{KIND_WORDS.get(kind, kind)}, {ms(longer)} a step, and the others wait for it."
        )
    words = (
        f"{said} Each bar is a rank's typical step. All are about as long, since ranks meet in "
        "every step: who computes longer waits less."
    )
    shown, most = _chosen(figures, slow[0] if slow else None)
    scale = Scale(0.0, max(parts.wall for parts in figures.ranks.values()))
    rows = "".join(
        _rank(figures, rank, scale, slow is not None and rank == slow[0]) for rank in shown
    )
    body = f'<div style="margin-top:12px">{rows}</div>'
    if most:
        body += f'<p class="loss">Sampled: {len(shown)} of {most} ranks are shown.</p>'
    return Section("Ranks side by side", words, body, "ranks")


def _chosen(figures: Figures, slow: int | None) -> tuple[list[int], int]:
    ranks = list(figures.ranks)
    if len(ranks) <= MOST_RANKS:
        return ranks, 0
    even = {ranks[at * (len(ranks) - 1) // (MOST_RANKS - 2)] for at in range(MOST_RANKS - 1)}
    return sorted(even | ({slow} if slow is not None else set())), len(ranks)


def _rank(figures: Figures, rank: int, scale: Scale, is_slow: bool) -> str:
    parts = figures.ranks[rank]
    waits = parts.total("exposed", "vote", "publish")
    late = figures.voting.late[rank] if figures.voting else 0.0
    said = f"computes {ms(parts.total(*COMPUTE))}, waits {ms(waits)}"
    came = f", comes to the vote {ms(late)} after the first" if late >= 0.5 else ""
    named = f"<b>rank {rank}{', the straggler' if is_slow else ''}</b>"
    return (
        f'<div style="font-size:13px;margin:8px 0 2px">{named} '
        f'<span class="soft">{said}<span class="wide">{came}</span></span></div>'
        + split_bar(parts, 15, scale)
    )


def steps_section(figures: Figures) -> Section:
    """Lengths of all steps, outliers named."""
    numbers = list(figures.walls)
    outliers = {one.number: one for one in figures.outliers}
    middle = figures.median
    words = (
        f"The length of each step, on average over ranks. The dashed line is the median, "
        f"{ms(middle)}; a step over one and a half times that is an outlier, and says where its "
        "time went. The first step also makes memory and learns the order of gradients."
    )
    shown = numbers
    if len(numbers) > MOST_STEPS:
        kept = {numbers[at * (len(numbers) - 1) // (MOST_STEPS - 1)] for at in range(MOST_STEPS)}
        shown = sorted(kept | set(list(outliers)[:MOST_STEPS]))
    body = figure(picture(_CHART, _steps(figures, shown), "the length of every step"))
    listed = "".join(
        f"<li>step {one.number}: {ms(one.wall)}, {escape(one.words)}</li>"
        for one in sorted(figures.outliers, key=lambda one: -one.wall)[:8]
    )
    body += f'<ul class="soft" style="font-size:14px">{listed}</ul>' if listed else ""
    if len(shown) < len(numbers):
        body += f'<p class="loss">Sampled: {len(shown)} of {len(numbers)} steps are drawn.</p>'
    return Section("Every step", words, body, "steps")


def _steps(figures: Figures, shown: Sequence[int]) -> Iterator[str]:
    top = max(figures.walls[number] for number in figures.run.settled) * 1.12
    room = max(1.0, shown[-1] - shown[0])
    scale = Scale(shown[0] - 0.14 * room, shown[-1] + 0.02 * room)
    outliers = {one.number for one in figures.outliers}

    def y(value: float) -> float:
        return 6 + (_CHART - _FOOT - 6) * (1 - value / top)

    for value in ticks(top, 5):
        yield line(0, y(value), 100, y(value), "grid")
        if value:
            yield text(0, y(value) - 3, ms(value) if value else "0", "tick")
    yield line(0, y(figures.median), 100, y(figures.median), "median")
    for number in shown:
        wall = figures.walls[number]
        if wall > top:  # the first: drawn to scale it would press all others flat
            yield text(scale.at(number), 9, f"step {number}: {ms(wall)}, above", "soft")
            continue
        colour = "exposed" if number in outliers else "dot"
        hint = f"step {number}: {ms(wall)}, {wall / figures.median:.2f} times the median"
        yield dot(scale.at(number), y(wall), 3.2, colour, hint)
    for number in sorted(outliers & set(shown), key=lambda each: -figures.walls[each])[:6]:
        side = "end" if scale.at(number) > 80 else "start"
        x = scale.at(number) + (-0.9 if side == "end" else 0.9)
        yield text(x, y(figures.walls[number]) + 4, f"step {number}", "bold", side)
    for value in _numbers(shown):
        yield text(scale.at(value), _CHART - 6, f"{value}", "tick", "middle")


def _numbers(shown: Sequence[int]) -> Iterator[int]:
    """Round step numbers below the axis."""
    every = ticks(shown[-1] - shown[0] or 1, 7)
    distance = max(1, round(every[1])) if len(every) > 1 else 1
    first = -(-shown[0] // distance) * distance
    yield from range(first, shown[-1] + 1, distance)
