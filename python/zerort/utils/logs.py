"""What programs log through DeepSpeed's names: on chosen ranks, once, and what memory is taken.

All of it goes to Python's logger `zerort`, at its level: see `zerort.log`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from functools import cache

from zerort import log
from zerort.device import default_place, device_for
from zerort.errors import ConfigError
from zerort.mesh import job_rank
from zerort.platforms import HERE

__all__ = [
    "log_dist",
    "log_dist_once",
    "logger",
    "see_memory_usage",
    "set_log_level_from_string",
]

logger = logging.getLogger("zerort")

_GIB = 2.0**30


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Logs a message, with the rank before it, on `ranks`: all where the first of them is -1, none
    where there are none. Without a process group it is logged.
    """
    wanted, rank = list(ranks or ()), job_rank()
    if rank is None:
        logger.log(level, "%s", message)
    elif wanted and (wanted[0] == -1 or rank in wanted):
        logger.log(level, "[Rank %d] %s", rank, message)


def log_dist_once(
    message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO
) -> None:
    """`log_dist`, each message once in a process."""
    _once(message, None if ranks is None else tuple(ranks), level)


@cache
def _once(message: str, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def set_log_level_from_string(
    log_level_str: str, custom_logger: logging.Logger | None = None
) -> None:
    """Sets the level of a logger, `zerort` when left out, and of its own handlers: "debug", "info",
    "warning", "error" or "critical". Raises `ConfigError`.
    """
    level = log.LEVELS.get(log_level_str.lower())
    if level is None:
        raise ConfigError(
            f"log level: expected one of {', '.join(log.LEVELS)}, got {log_level_str!r}"
        )
    chosen = logger if custom_logger is None else custom_logger
    if chosen is logger:
        log.set_level(log_level_str)
    chosen.setLevel(level)
    for handler in chosen.handlers:
        handler.setLevel(level)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs on rank 0, where `force` is given, what this process has of its device's memory and had
    at most, in GiB, and on the host at most; the device's peak is counted anew from there on.
    """
    if not force or job_rank():
        return
    gc.collect()
    device = device_for(default_place())
    found, host = device.memory(), HERE.peak_memory()
    parts = [] if found is None else [
        f"{found.allocated / _GIB:.2f} GiB allocated, {found.peak / _GIB:.2f} GiB at most"
    ]  # fmt: skip
    parts += [] if host is None else [f"on the host {host / _GIB:.2f} GiB at most"]
    logger.info("%s: %s", message, ", ".join(parts) or "not known here")
    device.forget_peak()
