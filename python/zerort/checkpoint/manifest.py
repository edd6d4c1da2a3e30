"""The manifest: everything about a checkpoint but its tensors' values. A JSON file, typed, hashed and limited.

It says enough for another program to read the tensors without this one: the buckets' layouts stand in it in figures.
The file has three parts, and its hash is that of the bytes of the second:

    {"format": 1, "xxh3_128": "<32 hexadecimal digits>", "manifest":
    <a JSON object, in one or several lines>
    }

What it guarantees: a `Manifest` that `parse` returned is consistent in itself. Every tensor lies inside its file, none
overlaps another, the runs of a shard fit into it, names of files cannot leave the folder. What it does not do: it
reads no file, and believes nothing about the files it describes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from zerort import _core
from zerort.checkpoint.blocks import BLOCK, Hashes
from zerort.checkpoint.tensors import DTYPES, size_of
from zerort.errors import CheckpointError, PlanError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "SCRIPT",
    "BucketEntry",
    "Counts",
    "FileEntry",
    "Manifest",
    "OptimizerEntry",
    "ParamEntry",
    "ParamState",
    "TensorEntry",
    "dump",
    "parse",
    "rank_file",
]

FORMAT = 1
MANIFEST = "manifest.json"
SCRIPT = "zero_to_fp32.py"
MANIFEST_LIMIT = 64 << 20
"""Bytes of a manifest."""
TENSOR_LIMIT = 10**6

_HEAD = re.compile(rb'\{"format": (\d{1,9}), "xxh3_128": "([0-9a-f]{32})", "manifest":\n')
_TAIL = b"\n}\n"

_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Code = Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]


def rank_file(rank: int) -> str:
    """The name of a rank's file of tensors."""
    return f"rank_{rank}.safetensors"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileEntry(_Entry):
    """A file of the checkpoint, as it was written."""

    name: str
    bytes: _Count
    xxh3_128: _Digest
    """Of the digits in `blocks`."""
    blocks: Annotated[str, Field(pattern=r"^([0-9a-f]{32})*$")]
    """xxh3-128 of each MiB, 32 digits each."""

    @property
    def hashes(self) -> Hashes:
        """For the reader."""
        return Hashes(self.bytes, self.blocks)


class TensorEntry(_Entry):
    """A tensor: bytes `start` to `end` of its file."""

    name: str
    file: str
    dtype: _Code
    shape: tuple[_Count, ...]
    start: _Count
    end: _Count
    runs: tuple[tuple[_Count, _Count], ...] | None = None
    """A part of a shard: (start, length), in elements of the shard, of the stretches that are stored, in order."""


class ParamState(_Entry):
    """What the optimizer keeps for a parameter."""

    values: dict[str, JsonValue]
    """What is one value for the whole parameter, such as a step count; encoded."""
    tensors: tuple[str, ...]
    """Keys of what has a value for each element; in the tensors `bucket.B.state.KEY`."""
    whole: tuple[str, ...] = ()
    """Keys of tensors of other shapes; in `optimizer.P.KEY` of rank 0's file."""


class ParamEntry(_Entry):
    """A parameter of the optimizer; its id P is its position."""

    name: str
    shape: tuple[_Count, ...]
    strides: tuple[_Count, ...]
    """How its elements lie in memory, hence in its bucket: dense, in any order of the dimensions."""
    dtype: Annotated[str, Field(pattern="^(F64|F32|F16|BF16)$")]
    group: _Count
    frozen: bool
    stored: bool
    """False for a frozen parameter that was left out."""
    state: ParamState | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class BucketEntry(_Entry):
    """Parameters in one flat buffer of `numel` elements, cut into one shard of `shard_numel` for each rank."""

    params: tuple[_Count, ...]
    offsets: tuple[_Count, ...]
    numel: _Count
    shard_numel: _Count


class OptimizerEntry(_Entry):
    """The optimizer's class and, for each of its groups, the options, encoded."""

    name: str
    groups: tuple[dict[str, JsonValue], ...]


class Counts(_Entry):
    """The engine's counters."""

    global_steps: _Count
    global_samples: _Count
    micro_steps: _Count
    skipped_steps: _Count


class Manifest(_Entry):
    """A checkpoint. Parameters and buckets are numbered by their position."""

    zerort: str
    torch: str
    saved: Annotated[str, Field(max_length=64)]
    """When, in UTC, as ISO 8601."""
    saved_ns: _Count
    """The same in nanoseconds since 1970."""
    world: Annotated[int, Field(ge=1, lt=1 << 20)]
    stage: Annotated[int, Field(ge=0, le=3)]
    plan_digest: str
    counters: Counts
    params: tuple[ParamEntry, ...]
    aliases: dict[str, str]
    """Further names of parameters and buffers, and the first name of each."""
    frozen: tuple[str, ...]
    """Names of the frozen parameters that the optimizer does not hold: `param.NAME`, unless they were left out."""
    buckets: tuple[BucketEntry, ...]
    optimizer: OptimizerEntry
    scheduler: JsonValue
    loss_scale: tuple[float, int, int, int] | None
    """Of a dynamic loss scale: the scale, hysteresis left, boundaries seen, boundary of the last overflow."""
    client_state: JsonValue
    extra_state: dict[str, JsonValue]
    """What modules return from `get_extra_state`, by their name."""
    ranks: tuple[dict[str, JsonValue], ...]
    """State of each rank's own: random number generators, position in the data."""
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    @cached_property
    def file(self) -> dict[str, FileEntry]:
        """Files by name."""
        return {entry.name: entry for entry in self.files}

    @cached_property
    def tensor(self) -> dict[tuple[str, str], TensorEntry]:
        """Tensors by file and name."""
        return {(entry.file, entry.name): entry for entry in self.tensors}

    @cached_property
    def param(self) -> dict[str, int]:
        """Ids of the planned parameters, by name."""
        return {entry.name: index for index, entry in enumerate(self.params)}

    @cached_property
    def dtype_of(self) -> dict[str, str]:
        """Dtype codes of tensors by name; the shards of a bucket have one."""
        return {entry.name: entry.dtype for entry in self.tensors}

    @cached_property
    def plan(self) -> _core.Plan:
        """The layout from which the shards come. Raises `CheckpointError` when the buckets do not tile."""
        params: Any = [(entry.numel, entry.dtype.lower(), entry.group, 0) for entry in self.params]
        buckets = [(entry.params, entry.offsets, entry.numel) for entry in self.buckets]
        try:
            return _core.Plan.restore(params, buckets, world=self.world, stage=self.stage)
        except (PlanError, OverflowError) as error:
            raise CheckpointError(f"{MANIFEST}: the buckets are not a layout: {error}") from error

    def in_file(self, name: str) -> list[TensorEntry]:
        """The tensors of one file by their position."""
        return sorted((entry for entry in self.tensors if entry.file == name), key=lambda entry: entry.start)

    def what(self, name: str) -> _Contents:
        """Says what lies between two bytes of a file."""
        return _Contents(self, name)


class _Contents:
    def __init__(self, manifest: Manifest, name: str) -> None:
        self._manifest, self._name = manifest, name

    def __call__(self, start: int, end: int) -> str:
        inside = [entry for entry in self._manifest.in_file(self._name) if entry.start < end and entry.end > start]
        if not inside:
            return "its header" if self._manifest.in_file(self._name) else "no tensor lies there"
        return f"tensor {inside[0].name}{f' and {len(inside) - 1} more' if len(inside) > 1 else ''}"


def dump(manifest: Manifest) -> bytes:
    """The file. Raises `CheckpointError` when it is longer than a reader would accept."""
    body = manifest.model_dump_json(exclude_defaults=True).encode()
    head = f'{{"format": {FORMAT}, "xxh3_128": "{xxhash.xxh3_128_hexdigest(body)}", "manifest":\n'.encode()
    data = head + body + _TAIL
    if len(data) > MANIFEST_LIMIT or len(manifest.tensors) > TENSOR_LIMIT:
        raise CheckpointError(
            f"the manifest has {len(data)} bytes and {len(manifest.tensors)} tensors, the limits are {MANIFEST_LIMIT} "
            f"and {TENSOR_LIMIT}: use larger buckets, or keep less in client_state"
        )
    return data


def parse(data: bytes) -> Manifest:
    """The manifest in a file's bytes, checked. Raises `CheckpointError` saying what is wrong."""
    match = _HEAD.match(data)
    if match is None or not data.endswith(_TAIL):
        raise CheckpointError(f"{MANIFEST} is damaged: it does not begin and end as a manifest does")
    if int(match[1]) != FORMAT:
        raise CheckpointError(f"{MANIFEST} has format {int(match[1])}, this version reads format {FORMAT}")
    body = data[match.end() : -len(_TAIL)]
    if xxhash.xxh3_128_hexdigest(body).encode() != match[2]:
        raise CheckpointError(f"{MANIFEST} is damaged: its hash is not the one it was written with")
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{MANIFEST}: {place}: {first['msg']}") from error
    for reason in _contradictions(manifest):
        raise CheckpointError(f"{MANIFEST} contradicts itself: {reason}")
    return manifest


def _contradictions(manifest: Manifest) -> Iterator[str]:
    if len(manifest.tensors) > TENSOR_LIMIT:
        yield f"{len(manifest.tensors)} tensors are more than {TENSOR_LIMIT}"
    expected = [*(rank_file(rank) for rank in range(manifest.world)), SCRIPT]
    if sorted(entry.name for entry in manifest.files) != sorted(expected):
        yield f"its files are not the {len(expected)} of a world of {manifest.world}"
    if len(manifest.ranks) != manifest.world:
        yield f"it holds the states of {len(manifest.ranks)} ranks of {manifest.world}"
    for entry in manifest.files:
        if len(entry.blocks) != 32 * -(-entry.bytes // BLOCK):
            yield f"{entry.name} has {entry.bytes} bytes and {len(entry.blocks) // 32} blocks"
        if entry.hashes.xxh3_128 != entry.xxh3_128:
            yield f"the hash of {entry.name} is not that of its blocks' hashes"
    if len(manifest.param) != len(manifest.params) or len(manifest.tensor) != len(manifest.tensors):
        yield "a name stands twice"
    for param in manifest.params:
        if not _dense(param):
            yield f"the strides {list(param.strides)} of {param.name} do not fill the shape {list(param.shape)}"
    yield from _misplaced_tensors(manifest)
    yield from _misfitting_runs(manifest)
    yield from _misfilled_buckets(manifest)


def _dense(param: ParamEntry) -> bool:
    """Whether the strides give each element a place of its own, from 0 to the last without a gap."""
    if len(param.strides) != len(param.shape):
        return False
    end = 1
    for stride, size in sorted((stride, size) for stride, size in zip(param.strides, param.shape, strict=True)):
        if size > 1 and param.numel:
            if stride != end:
                return False
            end *= size
    return True


def _misplaced_tensors(manifest: Manifest) -> Iterator[str]:
    ends: dict[str, int] = {}
    for entry in sorted(manifest.tensors, key=lambda entry: (entry.file, entry.start, entry.end)):
        if entry.file not in manifest.file:
            yield f"tensor {entry.name} lies in {entry.file!r}, which is no file of it"
        elif size_of(entry.dtype, entry.shape) != entry.end - entry.start:
            yield f"tensor {entry.name}, {entry.dtype} {list(entry.shape)}, has {entry.end - entry.start} bytes"
        elif entry.start < ends.get(entry.file, 8) or entry.end > manifest.file[entry.file].bytes:
            yield f"tensor {entry.name} of {entry.file} overlaps its neighbour or the end of the file"
        ends[entry.file] = entry.end


def _misfitting_runs(manifest: Manifest) -> Iterator[str]:
    for entry in manifest.tensors:
        match = re.fullmatch(r"bucket\.(\d{1,9})\.(master|state\..+)", entry.name)
        if (match is None) != (entry.runs is None):
            yield f"tensor {entry.name} should {'have no' if match is None else 'say which'} runs of a shard"
        if match is None or entry.runs is None:
            continue
        if int(match[1]) >= len(manifest.buckets):
            yield f"tensor {entry.name} belongs to no bucket"
            continue
        end = 0
        for start, length in entry.runs:
            if start < end:
                yield f"the runs of tensor {entry.name} overlap"
            end = start + length
        total = sum(length for _, length in entry.runs)
        if end > manifest.buckets[int(match[1])].shard_numel or entry.shape != (total,):
            yield f"the runs of tensor {entry.name} do not fit its shard or its shape"


def _misfilled_buckets(manifest: Manifest) -> Iterator[str]:
    held = Counter[str]()
    for entry in manifest.tensors:
        if entry.runs is not None:
            held[entry.name] += sum(length for _, length in entry.runs)
    for index, bucket in enumerate(manifest.buckets):
        if bucket.numel != manifest.world * bucket.shard_numel or len(bucket.params) != len(bucket.offsets):
            yield f"bucket {index} is no layout: {bucket.numel} elements in shards of {bucket.shard_numel}"
        elif any(param >= len(manifest.params) for param in bucket.params):
            yield f"bucket {index} is no layout: it holds a parameter that is not there"
        # What is promised must be there before anybody makes room for it.
        elif (
            sum(manifest.params[p].numel for p in bucket.params if manifest.params[p].stored)
            > (held[f"bucket.{index}.master"])
        ):
            yield f"the parameters of bucket {index} are longer than what is stored of them"
