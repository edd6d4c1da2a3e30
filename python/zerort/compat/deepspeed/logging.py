"""DeepSpeed's logging names, over the logger `zerort`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

from zerort.compat.deepspeed import comm
from zerort.compat.deepspeed.accelerator import get_accelerator

__all__ = [
    "log_dist",
    "log_dist_once",
    "logger",
    "print_rank_0",
    "see_memory_usage",
    "set_log_level_from_string",
]

logger = logging.getLogger("zerort")


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on `ranks`: -1 first among them means all, none mean no rank. Without a process group
    this one logs.
    """
    wanted = list(ranks or [])
    if not comm.is_initialized():
        logger.log(level, "%s", message)
    elif wanted and (wanted[0] == -1 or comm.get_rank() in wanted):
        logger.log(level, "[Rank %d] %s", comm.get_rank(), message)


@cache
def _once(message: str, ranks: tuple[int, ...], level: int) -> None:
    log_dist(message, ranks, level)


def log_dist_once(
    message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO
) -> None:
    """`log_dist`, each message once a process."""
    _once(message, tuple(ranks or ()), level)


def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
    """Prints on rank 0, if it is to be forced or debugged."""
    if comm.get_rank() == 0 and (debug or force):
        print(message)


def set_log_level_from_string(level: str, custom_logger: logging.Logger | None = None) -> None:
    """Sets a logger's level by its name, "info" for example. Raises `ValueError` for no level."""
    (custom_logger or logger).setLevel(level.upper())


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs, if `force`d, on rank 0 what this process has allocated and its peak, in GiB."""
    if not force or comm.get_rank() != 0:
        return
    device, gib = get_accelerator(), 2.0**30
    logger.info(
        "%s: %.2f GiB allocated, %.2f GiB at most",
        message,
        device.memory_allocated() / gib,
        device.max_memory_allocated() / gib,
    )
