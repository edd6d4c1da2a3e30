"""The script that rebuilds fp32 weights, as a file of checkpoints: one in each, and one beside
`latest`, where DeepSpeed's users look for it.

What stands beside `latest` under the script's name and is not this program's stays: it may be
DeepSpeed's, and the only reader of checkpoints that lie there too.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import SCRIPT

__all__ = ["LIMIT", "script", "script_is_due"]

LIMIT = 1 << 20
"""Bytes that one may have to be looked at."""
_LINES = 3
"""At its beginning, by which any version of it is known."""


@cache
def script() -> bytes:
    """The script."""
    return files(__package__).joinpath(SCRIPT).read_bytes()


def script_is_due(disk: Disk, folder: Path) -> bool:
    """Whether the folder lacks the script, or has another version of it."""
    path = folder / SCRIPT
    if not disk.exists(path):
        return True
    try:
        found = disk.read_whole(path, LIMIT)
    except OSError:  # a link, a folder, something long or closed to us: not ours
        return False
    head = b"".join(script().splitlines(keepends=True)[:_LINES])
    return found != script() and found.startswith(head)
