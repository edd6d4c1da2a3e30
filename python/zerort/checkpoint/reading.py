"""Reading a checkpoint: slices of its tensors are asked for one by one, and read and verified in
one sweep a file.

Two plans meet here, the one that saved and the one that is to be filled. The core says which
segments of which saved shards fill a shard, and `Shard.want` asks for those and nothing else. A
parameter whose elements lie in another order now (saved contiguous, channels-last today) has no
such segments: a rank that needs a part of it reads the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerort import _core
from zerort.checkpoint.blocks import BlockReader, Want
from zerort.checkpoint.encoding import decode
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import MANIFEST, Manifest, ParamEntry, TensorEntry, rank_file
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
        self._rest: list[Callable[[], object]] = []

    def check_names(self) -> None:
        """Raises `CheckpointError` for a file that is missing or does not belong. Hidden files are
        let be.
        """
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
        """Asks for the elements from `start` on, as many as `into` (1-D, contiguous, on CPU) holds,
        in its dtype.
        """
        dtype = DTYPES[entry.dtype]
        landing = into
        if dtype != into.dtype:
            landing = torch.empty(into.shape, dtype=dtype)
            self.then(partial(into.copy_, landing))
        byte = entry.start + start * dtype.itemsize
        self._wants.setdefault(entry.file, []).append(Want(byte, as_bytes(landing)))

    def then(self, call: Callable[[], object]) -> None:
        """Calls `call` once all that was asked for is there, behind those that came earlier."""
        self._rest.append(call)

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
        """Reads and verifies what was asked for. Raises `CheckpointError` naming file and tensor,
        and `OSError`.
        """
        wants, self._wants = self._wants, {}
        for file, wanted in wants.items():
            hashes = self.manifest.file[file].hashes
            self.blocks.read(self.folder / file, hashes, wanted, self.manifest.what(file))
        rest, self._rest = self._rest, []
        for call in rest:
            call()

    def value(self, encoded: Any, rank: int = 0) -> Any:
        """Decodes a value of the manifest, and asks for the tensors in it, which `rank` wrote."""
        return decode(encoded, lambda name: self.whole(rank_file(rank), name))


@dataclass(frozen=True)
class Shard:
    """One rank's shards under the plan that is to be filled."""

    plan: _core.Plan
    rank: int
    turned: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Strides of the plan's parameters whose elements lie in another order than in the checkpoint,
    by id.
    """

    def want(
        self, reader: Reader, bucket: int, kind: str, origins: Sequence[int], into: Tensor
    ) -> None:
        """Asks for what fills this rank's shard of `bucket` (shard_numel,) with `kind`, "master" or
        "state.KEY".

        `origins` says for each parameter which saved one it is, or -1. What has no origin keeps its
        value in `into`. Raises `CheckpointError` when the checkpoint lacks a part.
        """
        straight = [-1 if param in self.turned else origin for param, origin in enumerate(origins)]
        rows = _core.reshard(
            reader.manifest.plan, self.plan, bucket=bucket, rank=self.rank, came_from=straight
        )
        _want_rows(reader, kind, rows, into)
        for fragment in self.plan.fragments(bucket, self.rank) if self.turned else ():
            origin = origins[fragment.param]
            if fragment.param in self.turned and origin >= 0:
                self._want_turned(reader, kind, fragment, origin, into)

    def _want_turned(
        self, reader: Reader, kind: str, fragment: _core.Fragment, origin: int, into: Tensor
    ) -> None:
        saved = reader.manifest.params[origin]
        whole = _core.Plan([(saved.numel, "f32", 0, 0)], world=1, stage=0, cap_bytes=1)
        rows = _core.reshard(reader.manifest.plan, whole, bucket=0, rank=0, came_from=[origin])
        flat = torch.empty(saved.numel, dtype=into.dtype)
        _want_rows(reader, kind, rows, flat)
        part = into.narrow(0, fragment.shard_start, fragment.length)
        strides, start = self.turned[fragment.param], fragment.param_start
        reader.then(
            lambda: part.copy_(_turned(flat, saved, strides).narrow(0, start, fragment.length))
        )


def _want_rows(
    reader: Reader, kind: str, rows: Sequence[tuple[int, int, int, int, int]], into: Tensor
) -> None:
    """Asks for the segments that the core has named."""
    for start, source_rank, source_bucket, source_start, length in rows:
        entry = reader.entry(rank_file(source_rank), f"bucket.{source_bucket}.{kind}")
        reader.want(entry, _stored_at(entry, source_start, length), into.narrow(0, start, length))


def _turned(flat: Tensor, saved: ParamEntry, strides: tuple[int, ...]) -> Tensor:
    """A parameter's elements (numel,) as they lie with `strides`, from `flat` (numel,), where they
    lie as saved.
    """
    turned = torch.empty_like(flat)
    turned.as_strided(saved.shape, strides).copy_(flat.as_strided(saved.shape, saved.strides))
    return turned


def _stored_at(entry: TensorEntry, start: int, length: int) -> int:
    """Where elements of a shard lie in the tensor that holds some stretches of it."""
    stored = 0
    for run_start, run_length in entry.runs or ():
        if run_start <= start and start + length <= run_start + run_length:
            return stored + start - run_start
        stored += run_length
    raise CheckpointError(
        f"tensor {entry.name} of {entry.file} lacks elements {start} to {start + length} of its "
        "shard"
    )
