"""Loading a checkpoint into an engine of any world size, stage, bucket size and order of
parameters.

    find the tag, read the manifest   all ranks act on rank 0's bytes
    match, fit                        what goes where; names the first difference, before reading
    stage                             read and verify what this rank needs; all ranks agree
    restore_objects                   the user's objects, which may raise, and then all is undone
    apply                             only now the engine's memory changes

Damage found on the way is `Damaged`: with `fallback` the newest tag that verifies is loaded
instead, and without it the error names that tag.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from zerort.checkpoint.client import check_permission
from zerort.checkpoint.export import state_dict_of
from zerort.checkpoint.files import Disk
from zerort.checkpoint.fit import Fit, fit
from zerort.checkpoint.manifest import Manifest
from zerort.checkpoint.match import LoadOptions, Match, match
from zerort.checkpoint.objects import finish_objects, restore_objects
from zerort.checkpoint.parsing import parse
from zerort.checkpoint.reading import Reader
from zerort.checkpoint.record import LoadRecord, record_of
from zerort.checkpoint.restore import apply
from zerort.checkpoint.staging import Staged, stage
from zerort.checkpoint.state import EngineState
from zerort.checkpoint.tags import LATEST, check_tag, latest, read_manifest
from zerort.checkpoint.undo import Undo
from zerort.checkpoint.verify import newest_good
from zerort.errors import CheckpointError, CommError
from zerort.mesh import Consensus, Patience

__all__ = ["Damaged", "Load"]

_log = logging.getLogger("zerort")


class Damaged(CheckpointError):
    """The files are not what was written: another checkpoint may do."""


@dataclass
class Load:
    """One load. `custom` is DeepSpeed's `custom_load_fn(src=state dict, dst=module)`, which then
    loads the weights.
    """

    state: EngineState
    disk: Disk
    folder: Path
    options: LoadOptions
    custom: Callable[..., Any] | None = None
    timeout: float = 3600.0
    """Seconds that a rank may read nothing."""
    bytes_read: int = 0
    """By this rank, from the files of tensors."""
    manifest: Manifest | None = None
    """Of what was loaded."""
    record: LoadRecord | None = None
    staged: Staged | None = None
    """What was loaded."""
    _reader: Reader | None = None

    def run(self, tag: str | None, *, fallback: bool) -> tuple[str, Any] | None:
        """Loads `tag`, or what `latest` names; returns the tag and the client state, or None when
        there is no `latest`.

        Raises `CheckpointError` on all ranks alike; no value of the engine has changed then.
        """
        found: str | None = None
        if tag is not None:
            found = self._agreement.first("cannot load", lambda: check_tag(tag))
        try:
            found = found if found is not None else self._latest()
            return None if found is None else (found, self._load(found))
        except Damaged as error:
            other = newest_good(self._reading, self.disk, self.folder, found)
            if other is None:
                raise CheckpointError(
                    f"{error}; no other checkpoint in {self.folder} verifies"
                ) from error
            if not fallback:
                raise CheckpointError(
                    f"{error}; the newest checkpoint there that verifies is {other}: load it by "
                    "tag, or with fallback=True"
                ) from error
            if self.state.comm.rank == 0:
                _log.warning("%s; loading %s instead", error, other)
            return other, self._load(other)

    @property
    def _agreement(self) -> Consensus:
        return Consensus(self.state.comm.control, CheckpointError, alike=True)

    @property
    def _reading(self) -> Consensus:
        """For what only reads files, at the speed of its disk."""
        patience = Patience(
            f"load a checkpoint of {self.folder}",
            self.timeout,
            "zerort.checkpoint.timeout",
            lambda: 0 if self._reader is None else self._reader.blocks.bytes_read,
        )
        return Consensus(self.state.comm.control, CheckpointError, alike=True, patience=patience)

    def _latest(self) -> str | None:
        what = f"cannot read {self.folder / LATEST}"
        return self._reading.first(what, lambda: latest(self.disk, self.folder), Damaged)

    def _load(self, tag: str) -> Any:
        ranks, reading, what = (
            self._agreement,
            self._reading,
            f"cannot load checkpoint {self.folder / tag}",
        )
        data = reading.first(what, lambda: read_manifest(self.disk, self.folder, tag), Damaged)
        manifest = ranks.agree(what, lambda: self._parsed(data), Damaged)
        found, fits = ranks.agree(what, lambda: self._decided(manifest))
        staged, weights = reading.agree(
            what, lambda: self._read(tag, manifest, found, fits), Damaged
        )
        client_state = ranks.agree(what, lambda: _opened(staged))
        self.record = record_of(str(self.folder / tag), manifest, self.state.module, found, fits)
        undo = Undo()
        try:
            ranks.agree(what, lambda: self._objects(manifest, staged, weights, undo))
        except CommError:
            undo.run()
            raise
        except BaseException as error:
            self._take_back(undo, error)
            raise
        self._apply(found, staged, what)
        self.manifest, self.staged = manifest, staged
        return client_state

    def _parsed(self, data: bytes) -> Manifest:
        manifest = parse(data)
        manifest.plan  # noqa: B018 (raises where the buckets are no layout)
        return manifest

    def _decided(self, manifest: Manifest) -> tuple[Match, Fit]:
        options = self.options
        check_permission(manifest.client_state, allow_pickle=options.allow_pickle)
        return match(manifest, self.state, options), fit(manifest, self.state, options)

    def _read(
        self, tag: str, manifest: Manifest, found: Match, fits: Fit
    ) -> tuple[Staged, dict[str, Tensor]]:
        self._reader = reader = Reader(self.disk, self.folder / tag, manifest)
        reader.check_names()
        if self.custom is not None:
            reader.check_sizes()  # room for all of it is made
        staged = stage(reader, self.state, found, fits, self.options)
        weights = state_dict_of(reader, as_saved=True) if self.custom is not None else {}
        self.bytes_read = reader.blocks.bytes_read
        return staged, weights

    def _objects(
        self, manifest: Manifest, staged: Staged, weights: dict[str, Tensor], undo: Undo
    ) -> None:
        custom, module = self.custom, self.state.module
        call = None if custom is None else partial(custom, src=weights, dst=module)
        restore_objects(self.state, manifest, staged, self.options, call, undo)

    def _take_back(self, undo: Undo, error: BaseException) -> None:
        """Puts the engine back, on all ranks. Raises `CheckpointError` where that failed on one."""
        failures = self.state.comm.control.gather_objects(undo.run())
        reasons = [reason for failed in failures for reason in failed]
        if reasons:
            message = (
                f"{error}; and the engine could not be put back as it was ({'; '.join(reasons)}): "
                "load a checkpoint before going on"
            )
            self.state.broke_off(message)
            raise CheckpointError(message) from error

    def _apply(self, found: Match, staged: Staged, what: str) -> None:
        """Changes the engine's memory. An error here leaves it half loaded."""
        try:
            apply(self.state, found, staged, self.options)
            if self.custom is not None:
                for bucket in self.state.flat.buckets:
                    bucket.take_writes()
                self.state.exchange.take_writes()
            self._agreement.agree(what, lambda: finish_objects(self.state, staged))
        except BaseException as error:
            self.state.broke_off(
                f"{what}: it broke off halfway ({type(error).__name__}: {error}): load a "
                "checkpoint before going on"
            )
            raise


def _opened(staged: Staged) -> Any:
    return None if staged.client_state is None else staged.client_state.open()
