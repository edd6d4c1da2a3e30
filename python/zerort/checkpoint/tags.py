"""Names in a folder of checkpoints: tags, `latest`, the lock.

A tag is a plain folder of that name; a symbolic link is none, wherever it leads. `latest` holds a
tag and the hash of its name, so that a flipped bit cannot name another checkpoint.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import MANIFEST, MANIFEST_LIMIT, Manifest, is_file_of_checkpoint
from zerort.checkpoint.parsing import parse
from zerort.errors import CheckpointError

__all__ = [
    "LATEST",
    "LOCK",
    "TAG",
    "Listed",
    "check_tag",
    "folder_of",
    "latest",
    "latest_content",
    "listed",
    "read_manifest",
    "reserved",
]

LATEST = "latest"
"""The file that names the newest tag."""
LOCK = ".lock"
"""Held by rank 0 of the job that is saving."""
TAG = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

_LATEST_LIMIT = 256


@dataclass(frozen=True)
class Listed:
    """A tag and its manifest, or the reason why that cannot be read."""

    tag: str
    manifest: Manifest | None
    reason: str = ""


def folder_of(given: str | os.PathLike[str], parameter: str) -> Path:
    """The folder that a call was given. Raises `CheckpointError` for an empty name, which would be
    the working directory.
    """
    if not os.fspath(given):
        raise CheckpointError(
            f"{parameter} is empty: name a folder, or '.' for the working directory"
        )
    return Path(given)


def reserved(name: str) -> bool:
    """Whether the name stands for something else in a folder of checkpoints or in a checkpoint.

    Upper and lower case are one here, as some file systems have it.
    """
    return name.lower() == LATEST or is_file_of_checkpoint(name.lower())


def check_tag(tag: object) -> str:
    """The tag. Raises `CheckpointError` for a name that could leave the folder or stand for
    something else in it.
    """
    if not isinstance(tag, str) or not re.fullmatch(TAG, tag):
        raise CheckpointError(
            f"{tag!r} cannot be the tag of a checkpoint: letters, digits, '.', '_' and '-', at "
            "most 128, beginning with a letter or digit"
        )
    if reserved(tag):
        raise CheckpointError(
            f"{tag!r} cannot be the tag of a checkpoint: it is the name of a file of checkpoints"
        )
    return tag


def latest_content(tag: str) -> bytes:
    """What `latest` holds when it names `tag`: the tag, and the SHA-256 of its name.

    SHA-256 because the script of a checkpoint reads it too, with Python's library alone.
    """
    return f"{tag}\n{sha256(tag.encode()).hexdigest()}\n".encode()


def latest(disk: Disk, folder: Path) -> str | None:
    """The tag that `latest` names, or None where there is no such file. Raises `CheckpointError`
    when it is not what a save has written.
    """
    path = folder / LATEST
    try:
        data = disk.read_whole(path, _LATEST_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    tag = data.partition(b"\n")[0].decode("ascii", "replace")
    if data != latest_content(tag):
        raise CheckpointError(
            f"{path} is damaged: expected a tag on its first line and the SHA-256 of that tag on "
            "its second"
        )
    try:
        return check_tag(tag)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_manifest(disk: Disk, folder: Path, tag: str) -> bytes:
    """The bytes of a tag's manifest. Raises `CheckpointError` when there is none."""
    path = folder / check_tag(tag)
    if disk.exists(path) and not disk.is_folder(path):
        raise CheckpointError(
            f"{path} is no checkpoint: it is a file, or a symbolic link, which is not followed"
        )
    try:
        return disk.read_whole(path / MANIFEST, MANIFEST_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        kind = "is no checkpoint: it has no manifest" if disk.exists(path) else "does not exist"
        raise CheckpointError(f"{path} {kind}") from error


def listed(disk: Disk, folder: Path) -> list[Listed]:
    """All checkpoints of a folder, the newest first; those that cannot be read come last, with the
    reason.
    """
    found = [
        _look(disk, folder, name)
        for name in disk.names(folder)
        if re.fullmatch(TAG, name) and disk.exists(folder / name / MANIFEST)
    ]
    return sorted(
        found, key=lambda entry: (-entry.manifest.saved_ns if entry.manifest else 1, entry.tag)
    )


def _look(disk: Disk, folder: Path, tag: str) -> Listed:
    try:
        return Listed(tag, parse(read_manifest(disk, folder, tag)))
    except (CheckpointError, OSError) as error:
        return Listed(tag, None, str(error))
