"""The package's log: Python's logger `zerort`, and a handler for those who have configured none.

Progress and facts are INFO; what should worry is WARNING. Whatever the user configures wins,
before `show` or after it: a handler on `zerort` or on the root takes the place of the one here, and
a level set on either of them stays.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress

__all__ = ["LEVELS", "is_read_here", "set_level", "show"]

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
"""DeepSpeed's names."""

_log = logging.getLogger("zerort")


def _contained(handle: Callable[[logging.LogRecord], object]) -> Callable[..., None]:
    """A user's handler or filter that raises must not break a step off on one rank."""

    def contained(record: logging.LogRecord) -> None:
        try:
            handle(record)
        except Exception as error:
            with suppress(Exception):
                print(
                    f"zerort: a logging handler raised {error!r} over: {record.getMessage()}",
                    file=sys.stderr,
                )

    return contained


_log.handle = _contained(_log.handle)  # type: ignore[method-assign]


def show(rank: int) -> None:
    """Lets stderr show INFO on rank 0, WARNING on the others, until the user configures logging."""
    _default.withdraw()
    if not _log.hasHandlers():
        _default.install(logging.INFO if rank == 0 else logging.WARNING)


def set_level(name: str) -> None:
    """Chooses the level, one of `LEVELS` in any case of letters: none is chosen here any more."""
    _default.forget_level()
    _log.setLevel(LEVELS[name.lower()])


def is_read_here() -> bool:
    """Whether this rank's logger `zerort` has been given a handler of its own: a log file for
    each rank, say, where what concerns the rank is missed if only rank 0 tells.
    """
    return any(handler is not _default for handler in _log.handlers)


class _Default(logging.Handler):
    """The handler while there is no other, and the level while none has been chosen."""

    _level_given = logging.NOTSET
    """What `zerort`'s level was set to here."""

    def install(self, level: int) -> None:
        if _log.level == logging.NOTSET and logging.getLogger().level == logging.WARNING:
            _log.setLevel(level)
            self._level_given = level
        _log.addHandler(self)
        _log.addFilter(self._give_way)

    def withdraw(self) -> None:
        # the filter stays: it may be running, and taking it out would skip the next one
        _log.removeHandler(self)
        if _log.level == self._level_given:
            _log.setLevel(logging.NOTSET)
        self._level_given = logging.NOTSET

    def forget_level(self) -> None:
        """The level is the user's from now on."""
        self._level_given = logging.NOTSET

    def emit(self, record: logging.LogRecord) -> None:
        # looked up now: who redirects stderr later, as notebooks and test runners do, is followed
        try:
            print(f"zerort: {self.format(record)}", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self.handleError(record)

    def _give_way(self, record: logging.LogRecord) -> bool:
        """A filter of the logger, which is asked before any handler."""
        others = [*_log.handlers, *logging.getLogger().handlers]
        if others != [self]:
            self.withdraw()
        return _log.isEnabledFor(record.levelno)


_default = _Default()
