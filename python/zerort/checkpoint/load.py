"""Loading a checkpoint into an engine of any world size, stage, bucket size and order of
parameters.

    find the tag, read the manifest   all ranks act on rank 0's bytes
    match                             does it fit? Names the first difference, before reading
    stage                             read and verify what this rank needs; vote
    apply                             only now the engine changes

Damage found on the way is `Damaged`: with `fallback` the newest tag that verifies is loaded
instead, and without it the error names that tag.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zerort.checkpoint.export import state_dict_of
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import Manifest
from zerort.checkpoint.match import Choice, Match, match
from zerort.checkpoint.parsing import parse
from zerort.checkpoint.reading import Reader
from zerort.checkpoint.restore import Staged, apply, stage
from zerort.checkpoint.state import EngineState
from zerort.checkpoint.tags import LATEST, check_tag, latest, read_manifest
from zerort.checkpoint.verify import newest_good
from zerort.errors import CheckpointError
from zerort.mesh import Consensus

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
    choice: Choice
    custom: Callable[..., Any] | None = None
    bytes_read: int = 0
    """By this rank, from the files of tensors."""
    manifest: Manifest | None = None
    """Of what was loaded."""

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
            other = newest_good(self.state.comm, self.disk, self.folder, found)
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
        return Consensus(self.state.comm, CheckpointError, alike=True)

    def _latest(self) -> str | None:
        what = f"cannot read {self.folder / LATEST}"
        return self._agreement.first(what, lambda: latest(self.disk, self.folder), Damaged)

    def _load(self, tag: str) -> Any:
        ranks, what = self._agreement, f"cannot load checkpoint {self.folder / tag}"
        data = ranks.first(what, lambda: read_manifest(self.disk, self.folder, tag), Damaged)
        manifest = ranks.agree(what, lambda: self._parsed(data), Damaged)
        found = ranks.agree(what, lambda: match(manifest, self.state, self.choice))
        staged, weights = ranks.agree(what, lambda: self._read(tag, manifest, found), Damaged)
        self.manifest = manifest
        apply(self.state, manifest, found, staged, self.choice)
        if self.custom is not None:
            self.custom(src=weights, dst=self.state.module)
            for bucket in self.state.flat.buckets:
                bucket.take_writes()
        return staged.client_state

    def _parsed(self, data: bytes) -> Manifest:
        manifest = parse(data)
        manifest.plan  # noqa: B018 (raises where the buckets are no layout)
        return manifest

    def _read(self, tag: str, manifest: Manifest, found: Match) -> tuple[Staged, dict[str, Tensor]]:
        reader = Reader(self.disk, self.folder / tag, manifest)
        reader.check_names()
        staged = stage(reader, self.state, found, self.choice)
        weights = state_dict_of(reader, as_saved=True) if self.custom is not None else {}
        self.bytes_read = reader.blocks.bytes_read
        return staged, weights
