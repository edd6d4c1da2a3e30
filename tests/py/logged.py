"""What the package logs, as a list that grows."""

from __future__ import annotations

import logging

__all__ = ["log_lines", "withdraw"]

_LOGGER = logging.getLogger("zerort")
_added: list[tuple[logging.Handler, int]] = []  # and the level before it


def log_lines(level: int = logging.INFO) -> list[str]:
    """Configures the logger `zerort` to append each message from `level` on to the list."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    _added.append((handler, _LOGGER.level))
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(level)
    return lines


def withdraw() -> None:
    """Leaves the logger as it was before `log_lines`; the lists stay as they are."""
    while _added:
        handler, level = _added.pop()
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
