"""Temporary names: what a save or an export has under way, and which leftovers are ours to delete.

What it guarantees: nothing is ours by its name alone. A leftover of a save bears a nonce and is a
folder of nothing but files of a checkpoint, or the beginning of a `latest` or of the script; a
leftover of an export bears the nonce and the export's name, and no process holds it. Everything
else stays. What it does not do: it deletes nothing.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import SCRIPT, is_file_of_checkpoint
from zerort.checkpoint.script import LIMIT, script
from zerort.checkpoint.tags import LATEST, TAG
from zerort.errors import CheckpointError

__all__ = ["foreign_files", "left_by_saves", "named_for", "new_nonce", "temporary_path"]

_PREFIX = ".tmp-"
_NONCE = "[0-9a-f]{16}"
_UNFINISHED_LATEST = re.compile(
    rf"({TAG}(\n([0-9a-f]{{0,63}}|[0-9a-f]{{64}}\n?))?)?".encode() + rb"\0*"
)
"""A crash may leave any beginning of a file, and zeros where its data has not arrived."""
_LATEST_LIMIT = 256


def new_nonce() -> str:
    """What makes a temporary name one of a kind."""
    return secrets.token_hex(8)


def temporary_path(folder: Path, name: str, nonce: str) -> Path:
    """Where `name` is made before it gets that name."""
    return folder / f"{_PREFIX}{name}-{nonce}"


def named_for(name: str, found: str) -> bool:
    """Whether `found` is a temporary name for `name`."""
    return re.fullmatch(f"{re.escape(_PREFIX + name)}-{_NONCE}", found) is not None


def left_by_saves(disk: Disk, folder: Path) -> list[Path]:
    """What saves that died have left in `folder`. Only the holder of the folder's lock may ask:
    without it, they may be alive.
    """
    return [
        folder / name
        for name in disk.names(folder)
        if _is_unfinished_latest(disk, folder, name)
        or _is_unfinished_script(disk, folder, name)
        or _is_unfinished_save(disk, folder, name)
    ]


def foreign_files(disk: Disk, path: Path) -> list[str]:
    """What a folder holds that is no file of a checkpoint."""
    return [
        name
        for name in disk.names(path)
        if not is_file_of_checkpoint(name) or not disk.is_plain(path / name)
    ]


def _is_unfinished_save(disk: Disk, folder: Path, name: str) -> bool:
    return (
        re.fullmatch(f"{re.escape(_PREFIX)}{TAG}-{_NONCE}", name) is not None
        and disk.is_folder(folder / name)
        and not foreign_files(disk, folder / name)
    )


def _is_unfinished_latest(disk: Disk, folder: Path, name: str) -> bool:
    data = _small(disk, folder, LATEST, name, _LATEST_LIMIT)
    return data is not None and _UNFINISHED_LATEST.fullmatch(data) is not None


def _is_unfinished_script(disk: Disk, folder: Path, name: str) -> bool:
    data = _small(disk, folder, SCRIPT, name, LIMIT)
    return data is not None and script().startswith(data.rstrip(b"\0"))


def _small(disk: Disk, folder: Path, what: str, name: str, limit: int) -> bytes | None:
    """The content of a file that `name` says is temporary for `what`; None where it is none."""
    if not named_for(what, name) or not disk.is_plain(folder / name):
        return None
    try:
        return disk.read_whole(folder / name, limit)
    except (CheckpointError, OSError):
        return None
