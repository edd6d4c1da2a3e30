"""DeepSpeed's logging names, over the logger `zerort`."""

from __future__ import annotations

from zerort.compat.deepspeed import comm
from zerort.utils.logs import (
    log_dist,
    log_dist_once,
    logger,
    see_memory_usage,
    set_log_level_from_string,
)

__all__ = [
    "log_dist",
    "log_dist_once",
    "logger",
    "print_rank_0",
    "see_memory_usage",
    "set_log_level_from_string",
]


def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
    """Prints on rank 0, if it is to be forced or debugged."""
    if comm.get_rank() == 0 and (debug or force):
        print(message)
