"""Deleting old checkpoints of this run, and never anybody else's.

A run is one life of the training processes. What it loads makes the run that saved that, and all
that one went on from, its ancestors: a run that was restarted prunes what it saved before. Of the
checkpoints that this run or its ancestors made, the newest stay. What other runs saved into the
folder stays too, and so does one that holds files of other programs. Deletion begins with a
temporary name: under it a checkpoint is none any more, however far the deletion comes.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import ANCESTOR_LIMIT, Manifest
from zerort.checkpoint.tags import Listed, latest, listed
from zerort.checkpoint.temporary import foreign_files, new_nonce, temporary_path

__all__ = ["Pruned", "Run", "delete", "prune"]

_log = logging.getLogger("zerort")


@dataclass(frozen=True)
class Run:
    """This run and those that it goes on from."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    ancestors: tuple[str, ...] = ()
    """The latest first."""

    def behind(self, loaded: Manifest) -> Run:
        """This run, now that it goes on from a checkpoint."""
        chain = dict.fromkeys((loaded.run, *loaded.ancestors, *self.ancestors))
        chain.pop(self.id, None)
        return Run(self.id, tuple(chain)[:ANCESTOR_LIMIT])

    def made(self, manifest: Manifest) -> bool:
        """Whether the checkpoint is this run's, or its ancestors'."""
        return manifest.run == self.id or manifest.run in self.ancestors


@dataclass(frozen=True)
class Pruned:
    """What became of the checkpoints behind the newest ones."""

    gone: tuple[str, ...] = ()
    of_other_runs: tuple[str, ...] = ()
    """These stay, and do not count among the newest."""


def prune(disk: Disk, folder: Path, run: Run, keep_last: int, keep: frozenset[str]) -> Pruned:
    """Deletes all but the newest `keep_last` of this run's checkpoints, `keep`, and what `latest`
    names. Raises `OSError` where that cannot be done.
    """
    found = [entry for entry in listed(disk, folder) if entry.manifest is not None]
    ours = [entry for entry in found if _made(run, entry)]
    spared = keep | {latest(disk, folder)}
    gone: dict[str, Path] = {}
    for tag in (entry.tag for entry in ours[keep_last:] if entry.tag not in spared):
        foreign = visible(foreign_files(disk, folder / tag))
        if foreign:
            _log.warning(
                "checkpoint %s is not deleted: it holds %s, which is not of it",
                folder / tag,
                ", ".join(foreign[:3]),
            )
            continue
        gone[tag] = temporary_path(folder, tag, new_nonce())
        disk.rename(folder / tag, gone[tag])
    delete(disk, folder, list(gone.values()))
    others = tuple(entry.tag for entry in found if not _made(run, entry))
    return Pruned(tuple(gone), others)


def visible(names: Sequence[str]) -> list[str]:
    """Without the hidden ones."""
    return [name for name in names if not name.startswith(".")]


def delete(disk: Disk, folder: Path, paths: Sequence[Path]) -> None:
    """Deletes what has temporary names, once those are on disk: a crash might bring back the names
    before them.
    """
    if paths:
        disk.sync_folder(folder)
    for path in paths:
        disk.remove_tree(path)


def _made(run: Run, entry: Listed) -> bool:
    return entry.manifest is not None and run.made(entry.manifest)
