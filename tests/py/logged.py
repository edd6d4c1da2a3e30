"""What the package logs, as a list that grows."""

from __future__ import annotations

import logging

__all__ = ["log_lines"]


def log_lines(level: int = logging.INFO) -> list[str]:
    """Configures the logger `zerort` to append each message from `level` on to the list."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zerort")
    logger.addHandler(handler)
    logger.setLevel(level)
    return lines
