"""Shapes of a picture that is as wide as its column: x in percent, y in pixels, so that text keeps
its size on a phone and on a desk.

A shape's `hint` is shown by the browser when a pointer rests on it, and by the page's script on a
touch. Colours are classes of the page's style, which has a light and a dark value for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Scale", "bar", "dot", "inscribed", "line", "picture", "text", "ticks", "time_axis"]

_ROUND = (1, 2, 5)
_PHONE_PX, _DESK_PX, _LETTER_PX = 250, 780, 6.2
"""The narrowest columns that a label must fit, and how wide a letter is."""


@dataclass(frozen=True)
class Scale:
    """From `start` to `end` over the whole width."""

    start: float
    end: float

    def at(self, value: float) -> float:
        """Percent from the left."""
        return 100 * (value - self.start) / ((self.end - self.start) or 1.0)


def picture(height: float, shapes: Iterable[str], label: str) -> str:
    """An SVG as wide as what it is in; `label` says in words what it shows."""
    body = "".join(shapes)
    return (
        f'<svg width="100%" height="{height:g}" role="img" aria-label="{escape(label)}">'
        f"{body}</svg>"
    )


def bar(
    scale: Scale, start: float, end: float, top: float, height: float, colour: str, hint: str = ""
) -> str:
    """A rectangle, at least a hair wide."""
    x = scale.at(start)
    width = max(scale.at(end) - x, 0.08)
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<rect class="{colour}" x="{_number(x)}%" width="{_number(width)}%" y="{top:g}" '
        f'height="{height:g}">{title}</rect>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """From percent and pixels to percent and pixels."""
    return (
        f'<line class="{kind}" x1="{_number(x1)}%" y1="{_number(y1)}" x2="{_number(x2)}%" '
        f'y2="{_number(y2)}"/>'
    )


def dot(x: float, y: float, radius: float, colour: str, hint: str = "") -> str:
    """A filled circle."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<circle class="{colour}" cx="{_number(x)}%" cy="{_number(y)}" r="{radius:g}">{title}'
        "</circle>"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text; x in percent."""
    named = f' class="{kind}"' if kind else ""
    return (
        f'<text{named} x="{_number(x)}%" y="{_number(y)}" text-anchor="{anchor}">{escape(words)}'
        "</text>"
    )


def inscribed(scale: Scale, start: float, end: float, y: float, words: str) -> str:
    """A label within a bar, where it fits; on a phone fewer do."""
    width, need = scale.at(end) - scale.at(start), _LETTER_PX * len(words) + 6
    middle = (scale.at(start) + scale.at(end)) / 2
    if width / 100 * _PHONE_PX >= need:
        return text(middle, y, words, "in", "middle")
    if width / 100 * _DESK_PX >= need:
        return text(middle, y, words, "in desk", "middle")
    return ""


def ticks(end: float, most: int = 8) -> Sequence[float]:
    """Round values from 0 up to `end`, at most so many intervals."""
    distance = 1e-6
    while True:
        for digit in _ROUND:
            step = digit * distance
            if step * most >= end:
                return [step * at for at in range(int(end / step * (1 + 1e-9)) + 1)]
        distance *= 10


def time_axis(scale: Scale, top: float, bottom: float) -> list[str]:
    """Lines at round times from the scale's start, their numbers below; of a phone's every second
    number is left out.
    """
    found = []
    values = ticks(scale.end - scale.start)
    for index, value in enumerate(values):
        x = scale.at(scale.start + value)
        found.append(line(x, top, x, bottom, "grid"))
        if x > 97:
            continue
        words = f"{value:g} ms" if index == 0 else f"{value:g}"
        kind = "tick desk" if index % 2 else "tick"
        found.append(text(x, bottom + 13, words, kind, "start" if index == 0 else "middle"))
    return found


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
