"""Names in a folder of checkpoints: tags, `latest`, the lock, and what a dead save has left."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import MANIFEST, MANIFEST_LIMIT, Manifest
from zerort.checkpoint.parsing import parse
from zerort.errors import CheckpointError

__all__ = [
    "LATEST",
    "LOCK",
    "TEMPORARY",
    "Listed",
    "check_tag",
    "latest",
    "listed",
    "read_manifest",
]

LATEST = "latest"
"""The file that names the newest tag, on one line."""
LOCK = ".lock"
"""Held by rank 0 of the job that is saving."""
TEMPORARY = ".tmp-"
"""What begins so belongs to a save under way or to one that died."""

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Listed:
    """A tag and its manifest, or the reason why that cannot be read."""

    tag: str
    manifest: Manifest | None
    reason: str = ""


def check_tag(tag: object) -> str:
    """The tag. Raises `CheckpointError` for a name that could leave the folder or stand for
    something else in it.
    """
    if not isinstance(tag, str) or not _TAG.fullmatch(tag) or tag == LATEST:
        raise CheckpointError(
            f"{tag!r} cannot be the tag of a checkpoint: letters, digits, '.', '_' and '-', at "
            f"most 128, beginning with a letter or digit, and not {LATEST!r}"
        )
    return tag


def latest(disk: Disk, folder: Path) -> str | None:
    """The tag that `latest` names, or None where there is no such file. Raises `CheckpointError`
    for nonsense in it.
    """
    try:
        data = disk.read_whole(folder / LATEST, 256)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return check_tag(data.decode("ascii", "replace").strip())
    except CheckpointError as error:
        raise CheckpointError(f"{folder / LATEST} is damaged: {error}") from error


def read_manifest(disk: Disk, folder: Path, tag: str) -> bytes:
    """The bytes of a tag's manifest. Raises `CheckpointError` when there is none."""
    try:
        return disk.read_whole(folder / check_tag(tag) / MANIFEST, MANIFEST_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        kind = (
            "is no checkpoint: it has no manifest"
            if disk.exists(folder / tag)
            else "does not exist"
        )
        raise CheckpointError(f"{folder / tag} {kind}") from error


def listed(disk: Disk, folder: Path) -> list[Listed]:
    """All checkpoints of a folder, the newest first; those that cannot be read come last, with the
    reason.
    """
    found = [
        _look(disk, folder, name)
        for name in disk.names(folder)
        if _TAG.fullmatch(name) and disk.exists(folder / name / MANIFEST)
    ]
    return sorted(
        found, key=lambda entry: (-entry.manifest.saved_ns if entry.manifest else 1, entry.tag)
    )


def _look(disk: Disk, folder: Path, tag: str) -> Listed:
    try:
        return Listed(tag, parse(read_manifest(disk, folder, tag)))
    except (CheckpointError, OSError) as error:
        return Listed(tag, None, str(error))
