"""Reading a checkpoint: slices of its tensors are asked for one by one, and read and verified in one sweep a file.

Two plans meet here, the one that saved and the one that is to be filled. The core says which segments of which saved
shards fill a shard, and `Shard.want` asks for those and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerort import _core
from zerort.checkpoint.blocks import BlockReader, Want
from zerort.checkpoint.encoding import decode
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import MANIFEST, Manifest, TensorEntry, rank_file
from zerort.checkpoint.tensors import DTYPES, as_bytes
from zerort.errors import CheckpointError

__all__ = ["Reader", "Shard"]


class Reader:
    """The files of one checkpoint. What was asked for has its values after the next `fill`."""

    def __init__(self, disk: Disk, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.blocks = BlockReader(disk)
        self._disk = disk
        self._wants: dict[str, list[Want]] = {}
        self._casts: list[tuple[Tensor, Tensor]] = []

    def check_names(self) -> None:
        """Raises `CheckpointError` for a file that is missing or does not belong. Hidden files are let be."""
        have = {name for name in self._disk.names(self.folder) if not name.startswith(".")}
        want = {MANIFEST, *self.manifest.file}
        told = [f"{name} is missing" for name in sorted(want - have)]
        told += [f"{name} does not belong to it" for name in sorted(have - want)]
        if told:
            raise CheckpointError(f"{self.folder}: {'; '.join(told[:8])}")

    def check_sizes(self) -> None:
        """Raises `CheckpointError` for a file that has another length than when it was written."""
        for entry in self.manifest.files:
            self.blocks.check_size(self.folder / entry.name, entry.hashes)

    def want(self, entry: TensorEntry, start: int, into: Tensor) -> None:
        """Asks for the elements from `start` on, as many as `into` (1-D, contiguous, on CPU) holds, in its dtype."""
        dtype = DTYPES[entry.dtype]
        landing = into
        if dtype != into.dtype:
            landing = torch.empty(into.shape, dtype=dtype)
            self._casts.append((into, landing))
        byte = entry.start + start * dtype.itemsize
        self._wants.setdefault(entry.file, []).append(Want(byte, as_bytes(landing)))

    def whole(self, file: str, name: str) -> Tensor:
        """Asks for a whole tensor."""
        entry = self.entry(file, name)
        into = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.want(entry, 0, into.view(-1))
        return into

    def entry(self, file: str, name: str) -> TensorEntry:
        """Raises `CheckpointError` when the file holds no such tensor."""
        entry = self.manifest.tensor.get((file, name))
        if entry is None:
            raise CheckpointError(f"{self.folder / file} holds no tensor {name}")
        return entry

    def fill(self) -> None:
        """Reads and verifies what was asked for. Raises `CheckpointError` naming file and tensor, and `OSError`."""
        wants, self._wants = self._wants, {}
        for file, wanted in wants.items():
            hashes = self.manifest.file[file].hashes
            self.blocks.read(self.folder / file, hashes, wanted, self.manifest.what(file))
        casts, self._casts = self._casts, []
        for into, landing in casts:
            into.copy_(landing)

    def value(self, encoded: Any, rank: int = 0) -> Any:
        """Decodes a value of the manifest, and asks for the tensors in it, which `rank` wrote."""
        return decode(encoded, lambda name: self.whole(rank_file(rank), name))


@dataclass(frozen=True)
class Shard:
    """One rank's shards under the plan that is to be filled."""

    plan: _core.Plan
    rank: int

    def want(self, reader: Reader, bucket: int, kind: str, origins: Sequence[int], into: Tensor) -> None:
        """Asks for what fills this rank's shard of `bucket` (shard_numel,) with `kind`, "master" or "state.KEY".

        `origins` says for each parameter which saved one it is, or -1. What has no origin keeps its value in `into`.
        Raises `CheckpointError` when the checkpoint lacks a part.
        """
        saved = reader.manifest.plan
        rows = _core.reshard(saved, self.plan, bucket=bucket, rank=self.rank, came_from=origins)
        for start, source_rank, source_bucket, source_start, length in rows:
            entry = reader.entry(rank_file(source_rank), f"bucket.{source_bucket}.{kind}")
            reader.want(entry, _stored_at(entry, source_start, length), into.narrow(0, start, length))


def _stored_at(entry: TensorEntry, start: int, length: int) -> int:
    """Where elements of a shard lie in the tensor that holds some stretches of it."""
    stored = 0
    for run_start, run_length in entry.runs or ():
        if run_start <= start and start + length <= run_start + run_length:
            return stored + start - run_start
        stored += run_length
    raise CheckpointError(
        f"tensor {entry.name} of {entry.file} lacks elements {start} to {start + length} of its shard"
    )
