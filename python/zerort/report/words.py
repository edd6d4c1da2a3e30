"""Figures as words: times, bytes, rates, shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["KIND_NAMES", "KIND_WORDS", "amount", "count", "listed", "ms", "percent", "rate"]

KIND_NAMES: Mapping[str, str] = {
    "forward": "forward",
    "backward": "backward",
    "exposed": "exposed communication",
    "sums": "sums",
    "vote": "vote",
    "optimizer": "optimizer",
    "publish": "publish",
    "engine": "bookkeeping",
    "outside": "outside the engine",
}
"""What kinds of time are called on the page."""

KIND_WORDS: Mapping[str, str] = {
    "forward": "in forward",
    "backward": "in backward",
    "exposed": "in exposed communication",
    "sums": "in sums",
    "vote": "in the vote",
    "optimizer": "in the optimizer",
    "publish": "in publish",
    "engine": "in bookkeeping",
    "outside": "outside the engine",
}


def ms(value: float) -> str:
    """Two digits of a short time, three of a long one."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.1f} s"
    if abs(value) >= 99.5:
        return f"{value:,.0f} ms"
    return f"{value:.1f} ms" if abs(value) >= 0.95 else f"{value:.2f} ms"


def amount(size: float) -> str:
    """Bytes, in powers of ten, as rates are."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            scaled = size / scale
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{size:.0f} B"


def rate(bytes_a_second: float) -> str:
    """GB/s, or MB/s for a slow wire."""
    if bytes_a_second >= 1e8:
        return f"{bytes_a_second / 1e9:.3g} GB/s"
    return f"{bytes_a_second / 1e6:.3g} MB/s"


def percent(part: float, whole: float) -> str:
    """A share of something; one digit behind the point where it is small."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %"


def count(number: float, one: str, many: str) -> str:
    """A number of things."""
    text = f"{number:.0f}" if abs(number - round(number)) < 0.05 else f"{number:.1f}"
    return f"{text} {one if text == '1' else many}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names with commas, the first of many."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
