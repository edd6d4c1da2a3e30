"""A section with curves over the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2

from zerort.report.page import Section, figure
from zerort.report.svg import dot, line, picture, text, ticks

__all__ = ["Series", "scaling"]

_HEIGHT, _TOP, _FOOT = 280, 16, 36
_LEFT, _WIDTH = 12, 70
"""Percent of the width at which curves begin, behind the numbers of the axis, and end, before their
names.
"""
_LABEL_PX = 14
_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """A curve: (ranks, value) in any order. What was `measured` is drawn as dots alone."""

    name: str
    points: Sequence[tuple[float, float]]
    measured: bool = False
    note: str = ""
    """Told when a pointer rests on it."""


@dataclass(frozen=True)
class _Plane:
    """Where ranks and values lie."""

    ranks: Sequence[float]
    top: float
    unit: str

    def x(self, ranks: float) -> float:
        """Percent."""
        low, high = log2(self.ranks[0]), log2(self.ranks[-1])
        return _LEFT + (_WIDTH - _LEFT) * (log2(ranks) - low) / ((high - low) or 1.0)

    def y(self, value: float) -> float:
        """Pixels."""
        return _TOP + (_HEIGHT - _TOP - _FOOT) * (1 - value / self.top)


def scaling(
    title: str, words: str, series: Sequence[Series], *, unit: str = "ms", x: str = "ranks"
) -> Section:
    """Lines over log2 of the ranks, which are 1 or more; values from 0. A curve's name stands at
    its end.
    """
    letters = (letter if letter.isalnum() else " " for letter in title.lower())
    anchor = "-".join("".join(letters).split())
    drawn = [one for one in series if one.points]
    ranks = sorted({at for one in drawn for at, _ in one.points})
    if not ranks:
        return Section(title, words, "", anchor)
    plane = _Plane(ranks, max(value for one in drawn for _, value in one.points) or 1.0, unit)
    shapes = list(_grid(plane, x))
    for index, one in enumerate(drawn):
        shapes += _curve(one, f"series{index % _COLOURS}", plane)
    shapes += _names(drawn, plane)
    return Section(title, words, figure(picture(_HEIGHT, shapes, title)), anchor)


def _grid(plane: _Plane, x: str) -> Iterator[str]:
    for value in ticks(plane.top, 5):
        yield line(0, plane.y(value), _WIDTH, plane.y(value), "grid")
        words = f"{value:g} {plane.unit}" if value else "0"
        yield text(0, plane.y(value) - 3, words, "tick")
    every = -(-len(plane.ranks) // 6)
    for index, at in enumerate(plane.ranks):
        if index % every == 0:
            yield text(plane.x(at), _HEIGHT - 19, f"{at:g}", "tick", "middle")
    yield text((_LEFT + _WIDTH) / 2, _HEIGHT - 3, x, "tick", "middle")


def _curve(one: Series, colour: str, plane: _Plane) -> Iterator[str]:
    points = sorted(one.points)
    places = [(plane.x(at), plane.y(value)) for at, value in points]
    if not one.measured:
        for (x1, y1), (x2, y2) in pairwise(places):
            yield line(x1, y1, x2, y2, colour)
    for (at, value), (px, py) in zip(points, places, strict=True):
        hint = f"{one.name}\n{at:g} ranks: {value:.4g} {plane.unit}"
        note = f"\n{one.note}" if one.note else ""
        yield dot(px, py, 4 if one.measured else 2.5, colour, hint + note)


def _names(drawn: Sequence[Series], plane: _Plane) -> Iterator[str]:
    """Beside the last points, apart from one another."""
    last = [(plane.y(max(one.points)[1]), index, one) for index, one in enumerate(drawn)]
    at = float("-inf")
    for wanted, index, one in sorted(last, key=lambda item: item[:2]):
        at = max(wanted + 4, at + _LABEL_PX)
        words = one.name + (" (measured)" if one.measured and one.name != "measured" else "")
        yield text(_WIDTH + 1.5, at, words, f"series{index % _COLOURS}")
