"""The first sections of the page: what a step is made of, and the findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from zerort.report.figures import Figures
from zerort.report.findings import Finding
from zerort.report.lanes import colour_of
from zerort.report.page import Section, figure, paragraph
from zerort.report.split import COMPUTE, Split
from zerort.report.svg import Scale, bar, inscribed, picture
from zerort.report.words import KIND_NAMES, ms, percent

__all__ = [
    "facts_line",
    "findings_section",
    "headline",
    "lead",
    "legend",
    "split_bar",
    "split_section",
    "swatch",
]

_BAR = 34
_MOST_WAITS = 6


def lead(figures: Figures) -> str:
    """Below the title: what run this is, and what of it is missing."""
    losses = "".join(paragraph(f"{loss}.", "loss") for loss in figures.run.losses)
    return f'<p class="facts">{escape(facts_line(figures))}</p>{losses}'


def facts_line(figures: Figures) -> str:
    """What run this is, in a line."""
    run, facts = figures.run, figures.run.facts
    known = [
        f"{run.world} rank{'s' if run.world > 1 else ''}",
        f"ZeRO stage {facts['stage']}" if "stage" in facts else "",
        f"{facts['micro_batches']} micro-batches a step"
        if facts.get("micro_batches", 1) > 1
        else "",
        str(facts.get("device", "")),
        f"steps {run.numbers[0]} to {run.numbers[-1]}",
        f"run {facts['name']}" if "name" in facts else "",
    ]
    return " · ".join(word for word in known if word)


def headline(figures: Figures) -> str:
    """The page's title."""
    parts = figures.split
    waiting = parts.total("exposed", "vote", "publish")
    return (
        f"A step takes {ms(parts.wall)}; for {percent(waiting, parts.wall)} of it "
        "ranks wait for one another"
        if figures.run.world > 1
        else f"A step takes {ms(parts.wall)}"
    )


def split_section(figures: Figures) -> Section:
    """The bar that splits a step."""
    parts = figures.split
    words = (
        "A typical step, on average over the ranks and over the middle half of the steps by their "
        "length. Grey computes; in colour ranks wait or communicate. Communication that compute "
        "hides costs nothing, so it is not here."
    )
    body = figure(split_bar(parts, _BAR)) + legend(parts.by_kind(), parts.wall)
    return Section("Where a step's time goes", words, body + _waits(parts), "split")


def split_bar(parts: Split, height: float, scale: Scale | None = None) -> str:
    """All parts in a row, named where their names fit."""
    scale = scale or Scale(0.0, parts.wall)
    return picture(height, _bar(parts, height, scale), "the parts of a step")


def _bar(parts: Split, height: float, scale: Scale) -> Iterator[str]:
    at = 0.0
    for part in parts.parts:
        name = KIND_NAMES.get(part.kind, part.kind)
        hint = f"{name}{f', for {part.of}' if part.of else ''}: {ms(part.took)}"
        share = f"{hint} ({percent(part.took, parts.wall)})"
        yield bar(scale, at, at + part.took, 0, height, colour_of(part.kind), share)
        at += part.took
    at = 0.0
    for kind, took in parts.by_kind().items():
        if kind in COMPUTE and height > 20:
            yield inscribed(scale, at, at + took, height / 2 + 4, f"{kind} {ms(took)}")
        at += took


def legend(kinds: dict[str, float], whole: float) -> str:
    """What each colour is, and how much of it there is."""
    return _legend(
        [
            (colour_of(kind), KIND_NAMES.get(kind, kind), f"{ms(took)}, {percent(took, whole)}")
            for kind, took in kinds.items()
        ]
    )


def _legend(rows: Sequence[tuple[str, str, str]]) -> str:
    items = "".join(
        f"<li>{swatch(colour)}{escape(name)} <b>{escape(figure_)}</b></li>"
        for colour, name, figure_ in rows
    )
    return f'<ul class="legend">{items}</ul>'


def swatch(colour: str) -> str:
    """A little square of a colour."""
    return (
        '<svg aria-hidden="true" width="11" height="11">'
        f'<rect class="{colour}" width="11" height="11" rx="2"/></svg>'
    )


def _waits(parts: Split) -> str:
    """What exposed communication was waited for, as a sentence."""
    waits = parts.exposed()
    if not waits:
        return ""
    shown = ", ".join(f"{of} {ms(took)}" for of, took in waits[:_MOST_WAITS])
    rest = sum(took for _, took in waits[_MOST_WAITS:])
    more = f", {len(waits) - _MOST_WAITS} others {ms(rest)} together" if rest else ""
    words = f"Exposed communication, by what was waited for: {shown}{more}."
    return f'<div style="margin-top:10px">{paragraph(words, "soft")}</div>'


def findings_section(found: Sequence[Finding]) -> Section:
    """Words, each with its figure and its remedy."""
    if not found:
        words = "Nothing stands out: no single cause takes two percent of a step."
        return Section("What stands out", words, "", "findings")
    items = "".join(map(_item, found))
    words = (
        "Each line is computed from these traces. The figure is the time of a step that it is "
        "about; figures overlap, so they do not add up."
    )
    return Section("What stands out", words, f'<ul class="findings">{items}</ul>', "findings")


def _item(finding: Finding) -> str:
    cost = f"{ms(finding.cost)}<small>a step</small>" if finding.cost else "✓"
    remedy = paragraph(finding.remedy, "remedy")
    return f'<li><div class="cost">{cost}</div><div>{paragraph(finding.words)}{remedy}</div></li>'
