"""Reading a checkpoint: slices of its tensors are asked for one by one, and read and verified in
one pass a file.

Two plans meet here, the one that saved and the one that is to be filled. The core says which
segments of which saved shards fill a shard, and `Shard.want` asks for those and nothing else. A
parameter whose elements lie in another order now (saved contiguous, channels-last today) has no
such segments: a rank that needs a part of it reads the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerort import _core
from zerort.checkpoint.blocks import BlockReader, Hashes, Want
from zerort.checkpoint.encoding import decode
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Index,
    Manifest,
    TensorEntry,
    index_file,
    rank_file,
)
from zerort.checkpoint.parsing import parse_index
from zerort.checkpoint.state import strides_of
from zerort.checkpoint.tensors import DTYPES, as_bytes
from zerort.errors import CheckpointError
from zerort.memory import Placed

__all__ = ["Reader", "Shard"]

Row = tuple[int, int, int, int, int]
"""Of `_core.reshard`: start in the shard, source rank, source bucket, start there, length."""
Strides = Callable[[int], tuple[int, ...]]
"""Of a parameter, by id."""


class Reader:
    """The files of one checkpoint. What was asked for has its values after the next `fill`."""

    def __init__(self, disk: Disk, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.blocks = BlockReader(disk)
        self._disk = disk
        self._wants: dict[str, list[Want]] = {}
        self._rest: list[Callable[[], object]] = []
        self._runs: dict[int, _Runs] = {}
        """By the identity of their entry, which the manifest or its index keeps alive."""
        self._indexes: dict[str, Index] = {}

    def index(self, file: str) -> Index:
        """What stands beside a rank's file, or did in the manifest; read and verified when it is
        first asked for. Raises `CheckpointError` and `OSError`.
        """
        found = self._indexes.get(file)
        if found is None:
            found = self._indexes[file] = self._read_index(file)
        return found

    def _read_index(self, file: str) -> Index:
        manifest = self.manifest
        blocks = manifest.file[file].blocks
        if blocks is not None:
            tensors = [t for t in manifest.tensors if t.file == file and t.runs is not None]
            return Index.model_construct(tensors=tuple(tensors), blocks=blocks)
        entry = manifest.file[index_file(file)]
        data = self.blocks.verify(
            self.folder / entry.name, entry.hashes(), _an_index, head=entry.bytes
        )
        return parse_index(data, manifest, file)

    def hashes(self, entry: FileEntry) -> Hashes:
        """Of a file of the checkpoint. Raises as `index`."""
        return entry.hashes(self.index(entry.name).blocks if entry.blocks is None else None)

    def in_file(self, name: str) -> list[TensorEntry]:
        """The tensors of one file by their position. Raises as `index`."""
        found = {id(t): t for t in self.manifest.tensors if t.file == name}
        if name in self.manifest.file and self.manifest.file[name].blocks is None:
            found |= {id(t): t for t in self.index(name).tensors}
        return sorted(found.values(), key=lambda entry: entry.start)

    def what(self, name: str) -> _Contents:
        """Says what lies between two bytes of a file."""
        return _Contents(self, name)

    def check_names(self) -> None:
        """Raises `CheckpointError` for a file that is missing or does not belong. Hidden files are
        let be.
        """
        have = {name for name in self._disk.names(self.folder) if not name.startswith(".")}
        want = {MANIFEST, *self.manifest.file}
        wrong = [f"{name} is missing" for name in sorted(want - have)]
        wrong += [f"{name} does not belong to it" for name in sorted(have - want)]
        if wrong:
            raise CheckpointError(f"{self.folder}: {'; '.join(wrong[:8])}")

    def check_sizes(self) -> None:
        """Raises `CheckpointError` for a file that has another length than when it was written."""
        for entry in self.manifest.files:
            self.blocks.check_size(self.folder / entry.name, entry.bytes)

    def want(self, entry: TensorEntry, start: int, into: Tensor) -> None:
        """Asks for the elements from `start` on, as many as `into` (1-D, contiguous, on CPU) holds,
        in its dtype.
        """
        dtype = DTYPES[entry.dtype]
        as_saved = into
        if dtype != into.dtype:
            as_saved = torch.empty(into.shape, dtype=dtype)
            self.then(partial(into.copy_, as_saved))
        byte = entry.start + start * dtype.itemsize
        self._wants.setdefault(entry.file, []).append(Want(byte, as_bytes(as_saved)))

    def then(self, call: Callable[[], object]) -> None:
        """Calls `call` once all that was asked for is there, behind those that came earlier."""
        self._rest.append(call)

    def whole(self, file: str, name: str) -> Tensor:
        """Asks for a whole tensor."""
        entry = self.entry(file, name)
        into = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.want(entry, 0, into.view(-1))
        return into

    def of_optimizer(self, param: int, key: str) -> Tensor:
        """Asks for what the optimizer keeps of a parameter, as a whole."""
        name = f"optimizer.{param}.{key}"
        return self.whole(self.manifest.file_of.get(name, rank_file(0)), name)

    def entry(self, file: str, name: str) -> TensorEntry:
        """Raises `CheckpointError` when the file holds no such tensor."""
        entry = self.manifest.tensor.get((file, name))
        if entry is None and file in self.manifest.file:
            entry = self.index(file).tensor.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder / file} holds no tensor {name}")
        return entry

    def fill(self) -> None:
        """Reads and verifies what was asked for. Raises `CheckpointError` naming file and tensor,
        and `OSError`.
        """
        wants, self._wants = self._wants, {}
        for file, wanted in wants.items():
            hashes = self.hashes(self.manifest.file[file])
            self.blocks.read(self.folder / file, hashes, wanted, self.what(file))
        rest, self._rest = self._rest, []
        for call in rest:
            call()

    def value(self, encoded: Any, rank: int = 0) -> Any:
        """Decodes a value of the manifest, and asks for the tensors in it, which `rank` wrote."""
        return decode(encoded, lambda name: self.whole(rank_file(rank), name))

    def planned(self, param: int) -> Tensor:
        """Asks for the masters of a planned parameter, its values where it had none, in its shape;
        contiguous after `fill`.
        """
        saved = self.manifest.params[param]
        flat = self.flat(param, "master", self._master_dtype(param))
        into = torch.empty(saved.shape, dtype=flat.dtype)
        self.then(lambda: into.copy_(flat.as_strided(saved.shape, saved.strides)))
        return into

    def flat(self, param: int, kind: str, dtype: torch.dtype) -> Tensor:
        """Asks for all elements (numel,) of a planned parameter, in the order in which they lie."""
        numel = self.manifest.params[param].numel
        whole = _core.Plan([(numel, "f32", 0, 0)], world=1, stage=0, cap_bytes=1)
        flat = torch.empty(numel, dtype=dtype)
        rows = _core.reshard(self.manifest.plan, whole, bucket=0, rank=0, came_from=[param])
        self.rows(kind, rows, flat)
        return flat

    def _master_dtype(self, param: int) -> torch.dtype:
        saved = self.manifest.params[param]
        wide = torch.float64 if saved.dtype == "F64" else torch.float32
        return DTYPES[saved.dtype] if saved.group is None else wide

    def rows(self, kind: str, rows: Sequence[Row], into: Tensor) -> None:
        """Asks for the segments of shards that the core has named."""
        for start, source_rank, source_bucket, source_start, length in rows:
            entry = self.entry(rank_file(source_rank), f"bucket.{source_bucket}.{kind}")
            at = self._stored_at(entry, source_start, length)
            self.want(entry, at, into.narrow(0, start, length))

    def _stored_at(self, entry: TensorEntry, start: int, length: int) -> int:
        """Where elements of a shard lie in the tensor that holds some stretches of it."""
        runs = self._runs.get(id(entry))
        if runs is None:
            runs = self._runs[id(entry)] = _Runs(entry)
        at = runs.stored_at(start, length)
        if at is None:
            raise CheckpointError(
                f"tensor {entry.name} of {entry.file} lacks elements {start} to {start + length} "
                "of its shard"
            )
        return at


class _Contents:
    def __init__(self, reader: Reader, name: str) -> None:
        self._reader, self._name = reader, name

    def __call__(self, start: int, end: int) -> str:
        all_of_it = self._reader.in_file(self._name)
        inside = [entry for entry in all_of_it if entry.start < end and entry.end > start]
        if not inside:
            return "its header" if all_of_it else "no tensor lies there"
        return f"tensor {inside[0].name}{f' and {len(inside) - 1} more' if len(inside) > 1 else ''}"


def _an_index(start: int, end: int) -> str:
    return "hashes, and where tensors lie"


class _Runs:
    """The stretches of a shard that a tensor holds, for looking up one among many."""

    def __init__(self, entry: TensorEntry) -> None:
        self._runs = entry.runs or ()
        self._starts = [start for start, _ in self._runs]
        self._before = [0, *accumulate(length for _, length in self._runs)]

    def stored_at(self, start: int, length: int) -> int | None:
        """Where elements of the shard lie in the tensor; None where it lacks one of them."""
        index = bisect_right(self._starts, start) - 1
        if index < 0:
            return None
        run_start, run_length = self._runs[index]
        inside = start + length <= run_start + run_length
        return self._before[index] + start - run_start if inside else None


@dataclass(frozen=True)
class Shard:
    """One rank's shards under the plan that is to be filled."""

    plan: _core.Plan
    rank: int
    origins: Sequence[int]
    """For each parameter of the plan which saved one it is, or -1."""
    turned: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Strides of the plan's parameters whose elements lie in another order than in the checkpoint,
    by id.
    """
    whole: Mapping[int, str] = field(default_factory=dict)
    """Parameters of the plan, by id, that a whole tensor of rank 0's file fills."""

    def want(
        self,
        reader: Reader,
        bucket: Placed,
        kind: str,
        into: Tensor,
        holders: Set[int] | None = None,
    ) -> None:
        """Asks for what fills this rank's shard of `bucket` (shard_numel,) with `kind`, "master" or
        "state.KEY", out of saved shards.

        With `holders`, for these parameters alone. What has no origin keeps its value in `into`.
        Raises `CheckpointError` when the checkpoint lacks a part.
        """
        params = bucket.params
        origins = [
            self.origins[param] if holders is None or param in holders else -1 for param in params
        ]
        straight = [
            -1 if param in self.turned else origin
            for param, origin in zip(params, origins, strict=True)
        ]
        rows = _core.reshard(
            reader.manifest.plan, self.plan, bucket=bucket.id, rank=self.rank, came_from=straight
        )
        reader.rows(kind, rows, into)
        wanted = dict(zip(params, origins, strict=True))
        for fragment in self._fragments(bucket, self.turned):
            origin = wanted[fragment.param]
            if origin >= 0:
                self._want_turned(reader, kind, fragment, origin, into)

    def want_whole(self, reader: Reader, bucket: Placed, strides: Strides, into: Tensor) -> None:
        """Asks for what fills this rank's shard of `bucket` out of tensors that were saved whole.

        `strides` says how a parameter's elements lie in the bucket.
        """
        for fragment in self._fragments(bucket, self.whole):
            entry = reader.entry(rank_file(0), self.whole[fragment.param])
            part = into.narrow(0, fragment.shard_start, fragment.length)
            lies = strides(fragment.param)
            if lies == strides_of(torch.empty(entry.shape, device="meta")):
                reader.want(entry, fragment.param_start, part)
                continue
            saved = reader.whole(entry.file, entry.name)
            reader.then(partial(_take_turned, part, saved, lies, fragment.param_start))

    def _fragments(self, bucket: Placed, params: Mapping[int, object]) -> Iterator[_core.Fragment]:
        """This rank's fragments of those parameters."""
        if params:
            for fragment in self.plan.fragments(bucket.id, self.rank):
                if fragment.param in params:
                    yield fragment

    def _want_turned(
        self, reader: Reader, kind: str, fragment: _core.Fragment, origin: int, into: Tensor
    ) -> None:
        saved = reader.manifest.params[origin]
        flat = reader.flat(origin, kind, into.dtype)
        part = into.narrow(0, fragment.shard_start, fragment.length)
        shaped = flat.as_strided(saved.shape, saved.strides)
        lies = self.turned[fragment.param]
        reader.then(partial(_take_turned, part, shaped, lies, fragment.param_start))


def _take_turned(part: Tensor, saved: Tensor, strides: tuple[int, ...], start: int) -> None:
    """Fills `part` (n,) from element `start` of `saved` on, counted as they lie with `strides`."""
    turned = torch.empty(saved.numel(), dtype=part.dtype)
    turned.as_strided(saved.shape, strides).copy_(saved)
    part.copy_(turned.narrow(0, start, len(part)))
