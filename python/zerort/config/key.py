"""One row of the table of keys: a path, what becomes of it, and which values may stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = [
    "Fate",
    "Key",
    "absent",
    "disabled",
    "ignored",
    "off",
    "one_of",
    "refused",
    "same",
    "without",
]


class Fate(Enum):
    """What becomes of a key."""

    SAME = "same"
    IGNORED = "ignored"
    REFUSED = "refused"


def _never(value: Any) -> bool:
    return False


@dataclass(frozen=True)
class Key:
    """One row of the table."""

    path: str
    """Dotted path from the root of the file."""
    fate: Fate
    effect: str
    """What the key does, why nothing is lost without it, or why it is refused."""
    harmless: Callable[[Any], bool] = _never
    """Whether a value asks for nothing and may stand, where the key itself may not."""


def absent(value: Any) -> bool:
    """Whether a section is left out: null or false. Of some, even an empty one turns it on."""
    return value is None or value is False


def off(value: Any) -> bool:
    """Whether a value is null, false or an empty section."""
    return value is None or value is False or value == {}


def disabled(value: Any) -> bool:
    """Whether a section is off: left out, empty, or `"enabled": false`."""
    return off(value) or (isinstance(value, Mapping) and value.get("enabled", False) is False)


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is one of these, to the type, or null."""
    return lambda value: value is None or any(value == v and type(value) is type(v) for v in values)


def without(key: str, *values: Any) -> Callable[[Any], bool]:
    """Whether a section has one of these values at `key`, or is off."""
    harmless = one_of(*values)
    return lambda value: off(value) or (isinstance(value, Mapping) and harmless(value.get(key)))


def same(path: str, effect: str, harmless: Callable[[Any], bool] = _never) -> Key:
    """A key that is acted upon; a section whose value is `harmless` is as if it were left out."""
    return Key(path, Fate.SAME, effect, harmless)


def ignored(path: str, effect: str) -> Key:
    """A key without effect."""
    return Key(path, Fate.IGNORED, effect)


def refused(path: str, effect: str, harmless: Callable[[Any], bool] = off) -> Key:
    """A key that is refused unless its value is `harmless`."""
    return Key(path, Fate.REFUSED, effect, harmless)
