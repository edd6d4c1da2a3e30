"""Quantities as they are written on a command line, read strictly: a unit is never guessed.

`20us`, `25GB/s`, `200Mbit/s`, `400TFLOP/s`, `2..16384`, `"alpha=20us,beta=25GB/s"`. Each function
is the type of an argument, and refuses with what it expected.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import inf

from zerort import _core

__all__ = ["ALGORITHMS", "Wire", "flops", "nanoseconds", "scales", "wire"]

ALGORITHMS = ("ring", "halving", "tree", "flat", "broadcasts", "best")

_TIMES = {"ns": 1.0, "us": 1e3, "\N{MICRO SIGN}s": 1e3, "ms": 1e6, "s": 1e9}
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([^\d\s].*)")
_MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Wire:
    """A link between ranks."""

    alpha: float
    """ns of a message."""
    beta: float
    """Bytes a second through a rank's link."""
    algorithm: str | None = None
    """How collectives are made, by name; None is what the subject's device has."""
    message: float | None = None
    """ns that each further message adds where all are sent at once (flat)."""

    def link(self, usual: str) -> _core.Link:
        """As the core has it; `usual` is the algorithm where none is given."""
        algorithm = self.algorithm or usual
        return _core.Link(self.alpha, 1e9 / self.beta, algorithm, self.message)  # type: ignore[arg-type]


def nanoseconds(text: str) -> float:
    """A duration such as 20us."""
    value, unit = _split(text, "a duration such as 20us")
    if unit not in _TIMES:
        raise ArgumentTypeError(f"expected a duration in ns, us, ms or s, got {text!r}")
    return value * _TIMES[unit]


def bandwidth(text: str) -> float:
    """Bytes a second, such as 25GB/s or 200Mbit/s; always above 0."""
    wanted = "a bandwidth such as 25GB/s or 200Mbit/s"
    value, unit = _split(text, wanted)
    for ending, size in (("B/s", 1.0), ("bit/s", 1 / 8), ("b/s", 1 / 8)):
        prefix = unit.removesuffix(ending)
        scale = {**_PREFIXES, **_BINARY}.get(prefix)
        if unit.endswith(ending) and scale is not None:
            if value * scale * size <= 0:
                raise ArgumentTypeError(f"expected {wanted} above 0, got {text!r}")
            return value * scale * size
    raise ArgumentTypeError(f"expected {wanted}, got {text!r}")


def flops(text: str) -> float:
    """Floating point operations a second, such as 400TFLOP/s; always above 0."""
    wanted = "a rate such as 400TFLOP/s"
    value, unit = _split(text, wanted)
    unit = unit.upper().removesuffix("/S").removesuffix("S")
    scale = _PREFIXES.get(unit.removesuffix("FLOP"))
    if not unit.endswith("FLOP") or scale is None or value <= 0:
        raise ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value * scale


def scales(text: str) -> list[int]:
    """Numbers of ranks: `64`, `2,8,64`, or `2..16384`, which doubles."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        low, high = _ranks(first, text), _ranks(last if dots else first, text)
        if high < low:
            raise ArgumentTypeError(f"expected ranks to grow, got {text!r}")
        while low < high:
            found.append(low)
            low *= 2
        found.append(high)
    return sorted(set(found))


def wire(text: str) -> Wire:
    """`alpha=20us,beta=25GB/s`, and where wanted `algorithm=ring` and `message=2us`."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in {field.name for field in fields(Wire)} or key in pairs:
            raise ArgumentTypeError(
                f"expected alpha=20us,beta=25GB/s, each once, and perhaps algorithm and message; "
                f"got {text!r}"
            )
        pairs[key] = value
    return _wire(pairs, text)


def _wire(pairs: Mapping[str, str], text: str) -> Wire:
    missing = [key for key in ("alpha", "beta") if key not in pairs]
    if missing:
        raise ArgumentTypeError(
            f"expected {missing[0]} too, as in alpha=20us,beta=25GB/s: {text!r}"
        )
    algorithm = pairs.get("algorithm")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ArgumentTypeError(
            f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}"
        )
    alpha = _part("alpha", nanoseconds, pairs)
    message = _part("message", nanoseconds, pairs) if "message" in pairs else None
    return Wire(alpha, _part("beta", bandwidth, pairs), algorithm, message)


def _part(key: str, read: Callable[[str], float], pairs: Mapping[str, str]) -> float:
    try:
        return read(pairs[key])
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{key}: {error}") from None


def _split(text: str, wanted: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip())
    value = float(match[1]) if match else -1.0
    if match is None or not 0 <= value < inf:
        raise ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value, match[2].strip()


def _ranks(digits: str, text: str) -> int:
    good = digits.isascii() and digits.isdigit() and len(digits) < 9
    if not (good and 1 <= int(digits) <= _MOST_RANKS):
        raise ArgumentTypeError(
            f"expected ranks such as 64, 2,8,64 or 2..16384, from 1 to {_MOST_RANKS}, got {text!r}"
        )
    return int(digits)
