"""Values that no key can use, whatever its type: found before anything is made of them.

Text that is no Unicode cannot be written to a log or a file; a value that holds itself has no end.
Numbers are looked at where no model knows the key: in what optimizers and schedules are made with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from zerort.config.problems import Problem, expected

__all__ = ["bad_numbers", "unreadable", "walk"]

_DEEPEST = 32
_MOST = 10_000
"""Values below one key."""
_LARGEST = 2**63 - 1


def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything within `value`; what lies too deep, or comes too late, is left
    out, see `unreadable`.
    """
    stack, seen = [(path, value, 0)], 0
    while stack and seen < _MOST:
        where, item, depth = stack.pop()
        seen += 1
        inner = _inner(where, item)
        if inner is None:
            yield where, item
        elif depth < _DEEPEST:
            stack += [(name, part, depth + 1) for name, part in reversed(inner[:_MOST])]


def _inner(path: str, item: Any) -> list[tuple[str, Any]] | None:
    if isinstance(item, Mapping):
        return [(f"{path}.{name}", part) for name, part in item.items()]
    if isinstance(item, list | tuple):
        return [(f"{path}[{index}]", part) for index, part in enumerate(item)]
    return None


def unreadable(path: str, value: Any) -> Iterator[Problem]:
    """Text that is no Unicode, and a value that is nested too deeply or too large."""
    if _size_exceeded(value):
        yield Problem(path, "nested too deeply, or too many values")
        return
    for where, leaf in walk(path, value):
        if isinstance(leaf, str) and not _encodes(leaf):
            yield expected(where, "text in Unicode", leaf)


def _size_exceeded(value: Any) -> bool:
    level, seen = [value], 0
    for _ in range(_DEEPEST):
        level = [part for item in level for _, part in _inner("", item) or ()]
        seen += len(level)
        if not level or seen > _MOST:
            break
    return bool(level)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def bad_numbers(path: str, value: Any) -> Iterator[Problem]:
    """Numbers that are not finite, and integers beyond 64 bits."""
    for where, leaf in walk(path, value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            yield expected(where, "a finite number", leaf)
        elif isinstance(leaf, int) and abs(leaf) > _LARGEST:
            yield expected(where, "an integer of 64 bits", leaf)
