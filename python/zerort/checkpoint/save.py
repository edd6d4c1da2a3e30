"""The save protocol: a checkpoint is complete on every rank and survives a power loss, or it is not
listed.

    `open`     rank 0   lock DIR, delete what dead saves left, refuse an occupied tag,
                        create DIR/.tmp-TAG-NONCE/
    `write`    all      write rank_R.safetensors there, hash on the way, sync; write its index,
                        rank_R.json, sync; vote
    `seal`     rank 0   write the script, manifest.json, the next `latest` and the script that will
                        stand beside it, unless it is there; sync all
    `commit`   rank 0   rename the folder to DIR/TAG, or exchange the two; vote
    `point`    rank 0   sync DIR, rename the script and the next `latest` to their names, sync DIR
    `prune`    rank 0   delete what `keep_last` lets go; vote; unlock

What needs space happens before the rename, so a full disk leaves nothing half done behind it.
Whatever fails, all ranks raise the same `CheckpointError`, and `DIR/TAG` and `latest` are as they
were, or, after the rename, `DIR/TAG` is complete. The steps use one `Save` and no global state:
they run on the caller's thread or, over a copy of the state, on one beside training (`background`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zerort.checkpoint.blocks import HashedFile, Hashes
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import (
    MANIFEST,
    SCRIPT,
    FileEntry,
    Index,
    Manifest,
    ParamState,
    TensorEntry,
    dump,
    dump_index,
    index_file,
    rank_file,
)
from zerort.checkpoint.prune import Pruned, Run, delete, prune, visible
from zerort.checkpoint.script import script, script_is_due
from zerort.checkpoint.snapshot import Snapshot, merged_states
from zerort.checkpoint.tags import LATEST, LOCK, check_tag, latest_content
from zerort.checkpoint.temporary import foreign_files, left_by_saves, new_nonce, temporary_path
from zerort.checkpoint.tensors import as_bytes, place
from zerort.checkpoint.turns import TURNS
from zerort.errors import CheckpointError
from zerort.mesh import Comm, Consensus, Control, Patience

__all__ = ["Save", "SaveOptions", "Written", "agreed_tag"]

_log = logging.getLogger("zerort")


@dataclass(frozen=True)
class SaveOptions:
    """What a call of `save_checkpoint` asks for."""

    save_latest: bool = True
    overwrite: bool = False
    keep_last: int | None = None
    keep: frozenset[str] = frozenset()
    """Tags that are never deleted."""
    run: Run = field(default_factory=Run)
    """Whose checkpoint it will be; rank 0's counts."""
    timeout: float = 3600.0
    """Seconds that a rank may write nothing."""
    allow_pickle: bool = False
    """Whether objects in `client_state` may be pickled."""


@dataclass(frozen=True)
class Written:
    """A rank's file and its index, and what the rank knows for the manifest."""

    file: FileEntry
    index: FileEntry
    tensors: tuple[TensorEntry, ...]
    """In the file, without the parts of shards, which stand in the index."""
    dtypes: dict[str, str]
    """Of these parts, by name."""
    states: dict[int, ParamState]
    own: dict[str, object]


def agreed_tag(comm: Comm, tag: str, validation: Literal["WARN", "IGNORE", "FAIL"]) -> str:
    """Rank 0's tag, checked. Raises `CheckpointError` on all ranks when they differ and
    `validation` is FAIL.
    """
    agreement = Consensus(comm.control, CheckpointError, alike=True)
    tags = agreement.gather("cannot save", lambda: check_tag(tag))
    if len(set(tags)) > 1 and validation != "IGNORE":
        named = ", ".join(f"{rank}: {name}" for rank, name in enumerate(tags[:8]))
        message = f"ranks name different tags: {named}"
        if validation == "FAIL":
            raise CheckpointError(f"{message}; checkpoint.tag_validation is FAIL")
        if comm.rank == 0:
            _log.warning("%s; rank 0's is taken", message)
    return tags[0]


@dataclass
class Save:
    """One save under way, of the ranks of `control`. `run` goes through its steps, on whichever
    thread; nothing else may use `control` meanwhile.
    """

    control: Control
    disk: Disk
    folder: Path
    tag: str
    options: SaveOptions
    temporary: Path = field(init=False)
    next_latest: Path = field(init=False)
    next_script: Path = field(init=False)
    pruned: Pruned = field(default=Pruned(), init=False)
    """On rank 0."""
    _lock: int | None = field(default=None, init=False)
    _file: HashedFile | None = field(default=None, init=False)
    """This rank's."""

    @property
    def target(self) -> Path:
        """Where the checkpoint will be."""
        return self.folder / self.tag

    def run(self, snapshot: Snapshot, rest: Callable[[], None] | None = None) -> None:
        """The whole protocol, with a `rest` behind each block of this rank's file. Raises the same
        `CheckpointError` on all ranks, or `CommError` when a rank has gone.
        """
        not_saved = (
            f"checkpoint {self.target} was not saved, and what was there before is untouched"
        )
        not_named = (
            f"checkpoint {self.target} is complete, but `{LATEST}` may not name it after a power "
            "loss"
        )
        patience = Patience(
            f"save checkpoint {self.target}",
            self.options.timeout,
            "zerort.checkpoint.timeout",
            lambda: 0 if self._file is None else self._file.bytes_written,
        )
        agreement = Consensus(self.control, CheckpointError, alike=True, patience=patience)
        try:
            self._name(agreement.first(not_saved, self.open))
            written = agreement.gather(not_saved, lambda: self.write(snapshot, rest))
            agreement.first(not_saved, lambda: self.commit(written, snapshot))
            agreement.first(not_named, self.point)
        finally:
            if self.control.rank == 0:
                self._release()

    # The steps.

    def open(self) -> str:
        """Prepares the folder; returns the nonce of the temporary names."""
        self._make_folders(self.folder)
        self._take_lock()
        if self.disk.exists(self.target):
            self._check_target()
        nonce = new_nonce()
        self._name(nonce)
        self.disk.make_folder(self.temporary)
        return nonce

    def write(self, snapshot: Snapshot, rest: Callable[[], None] | None = None) -> Written:
        """This rank's file."""
        name = rank_file(self.control.rank)
        head, placed = place(snapshot.tensors)
        size = len(head) + sum(at.end - at.start for _, at in placed)
        with HashedFile(self.disk, self.temporary / name, size) as file:
            self._file = file
            file.write(head)
            for stored, _ in placed:
                for piece in stored.pieces:
                    file.write(as_bytes(piece), rest)
            hashes = file.finish()
        tensors = tuple(
            TensorEntry(
                name=at.name,
                file=name,
                dtype=at.code,
                shape=at.shape,
                start=at.start,
                end=at.end,
                runs=stored.runs,
            )
            for stored, at in placed
        )
        return self._with_index(name, hashes, tensors, snapshot)

    def _with_index(
        self, name: str, hashes: Hashes, tensors: tuple[TensorEntry, ...], snapshot: Snapshot
    ) -> Written:
        """Writes what stands beside the rank's file."""
        parts = tuple(tensor for tensor in tensors if tensor.runs is not None)
        beside = index_file(name)
        index = dump_index(Index(tensors=parts, blocks=hashes.blocks), beside)
        return Written(
            FileEntry(name=name, bytes=hashes.bytes, xxh3_128=hashes.xxh3_128),
            self._write(self.temporary / beside, index),
            tuple(tensor for tensor in tensors if tensor.runs is None),
            {part.name: part.dtype for part in parts},
            snapshot.states,
            snapshot.own,
        )

    def seal(self, written: list[Written], snapshot: Snapshot) -> None:
        """Writes what describes the checkpoint, and all that will be renamed later."""
        script_entry = self._write(self.temporary / SCRIPT, script())
        params = snapshot.shared["params"]
        dtypes = _dtypes(written)
        states = merged_states(
            (rank.states for rank in written), [entry["name"] for entry in params]
        )
        manifest = Manifest.model_validate(
            {
                **snapshot.shared,
                "run": self.options.run.id,
                "ancestors": self.options.run.ancestors,
                "params": tuple(
                    {**entry, "state": states.get(param)} for param, entry in enumerate(params)
                ),
                "buckets": tuple(
                    {**bucket, "dtypes": dtypes.get(number, {})}
                    for number, bucket in enumerate(snapshot.shared["buckets"])
                ),
                "ranks": tuple(rank.own for rank in written),
                "files": (
                    *(rank.file for rank in written),
                    *(rank.index for rank in written),
                    script_entry,
                ),
                "tensors": tuple(tensor for rank in written for tensor in rank.tensors),
            }
        )
        self._write(self.temporary / MANIFEST, dump(manifest))
        self.disk.sync_folder(self.temporary)
        if self.options.save_latest:
            if script_is_due(self.disk, self.folder):
                self._write(self.next_script, script())
            self._write(self.next_latest, latest_content(self.tag))

    def commit(self, written: list[Written], snapshot: Snapshot) -> None:
        """Seals the folder and gives it its name: the instant in which the checkpoint is."""
        self.seal(written, snapshot)
        try:
            self.disk.rename(self.temporary, self.target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not self.options.overwrite:
                raise
            # What was there now has the temporary name, and is deleted under it.
            self.disk.exchange(self.temporary, self.target)

    def point(self) -> None:
        """The name survives a power loss, and then `latest` names it, and then old checkpoints may
        go.
        """
        self.disk.sync_folder(self.folder)
        if self.options.save_latest:
            if self.disk.exists(self.next_script):
                self.disk.replace(self.next_script, self.folder / SCRIPT)
            self.disk.replace(self.next_latest, self.folder / LATEST)
            self.disk.sync_folder(self.folder)
        self.prune()

    def prune(self) -> None:
        """Deletes what `keep_last` lets go. What cannot be deleted stays, with a warning."""
        options = self.options
        if options.keep_last is None:
            return
        keep = options.keep | {self.tag}
        try:
            self.pruned = prune(self.disk, self.folder, options.run, options.keep_last, keep)
        except OSError as error:
            _log.warning(
                "checkpoint %s is saved, but old ones could not be deleted: %s", self.target, error
            )

    # What the steps need.

    def _name(self, nonce: str) -> None:
        self.temporary = temporary_path(self.folder, self.tag, nonce)
        self.next_latest = temporary_path(self.folder, LATEST, nonce)
        self.next_script = temporary_path(self.folder, SCRIPT, nonce)

    def _check_target(self) -> None:
        """Raises `CheckpointError` unless what has the tag's name may be replaced."""
        if not self.options.overwrite:
            raise CheckpointError(
                "the tag exists already: save under another, or with overwrite=True "
                "(configuration key zerort.checkpoint.overwrite), which exchanges the two in one "
                "instant"
            )
        if not self.disk.is_folder(self.target):
            raise CheckpointError(
                "the tag exists already, as a file or a symbolic link, and overwrite=True replaces "
                "checkpoints only: save under another"
            )
        foreign = visible(foreign_files(self.disk, self.target))
        if foreign:
            raise CheckpointError(
                f"the tag exists already and holds {foreign[0]}, which is no checkpoint's, and "
                "overwrite=True would delete it: save under another, or move it away"
            )

    def _make_folders(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folders(folder.parent)
        with suppress(
            FileExistsError
        ):  # another job's, a moment ago; the next operation fails if it is none
            self.disk.make_folder(folder)
        self.disk.sync_folder(folder.parent)

    def _take_lock(self) -> None:
        """Waits for other engines of this process that save here. Raises `CheckpointError` while
        another job does; with the lock, deletes what saves that died have left.
        """
        TURNS.take(self.folder, self)
        try:
            self._lock = self.disk.lock(self.folder / LOCK)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another job is saving into {self.folder} at this moment"
            ) from error
        if self._lock is not None:
            delete(self.disk, self.folder, left_by_saves(self.disk, self.folder))

    def _write(self, path: Path, data: bytes) -> FileEntry:
        with HashedFile(self.disk, path) as file:
            file.write(data)
            return _entry(path.name, file.finish())

    def _release(self) -> None:
        """Removes what is temporary, as far as that can be done, and lets go of the lock."""
        try:
            if hasattr(self, "temporary"):
                with suppress(OSError):
                    made = (self.temporary, self.next_latest, self.next_script)
                    left = [path for path in made if self.disk.exists(path)]
                    delete(self.disk, self.folder, left)
            if self._lock is not None:
                lock, self._lock = self._lock, None
                with suppress(OSError):
                    self.disk.close(lock)
        finally:
            TURNS.end(self)


def _dtypes(written: list[Written]) -> dict[int, dict[str, str]]:
    """What is stored of each bucket, and in which dtype."""
    found: dict[int, dict[str, str]] = {}
    for name, code in {
        name: code for rank in written for name, code in rank.dtypes.items()
    }.items():
        _, number, kind = name.split(".", 2)
        found.setdefault(int(number), {})[kind] = code
    return found


def _entry(name: str, hashes: Hashes) -> FileEntry:
    return FileEntry(name=name, bytes=hashes.bytes, xxh3_128=hashes.xxh3_128, blocks=hashes.blocks)
