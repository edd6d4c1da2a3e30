"""The manifest: everything about a checkpoint but its tensors' values. A JSON file, typed, hashed
and limited.

It says enough for another program to read the tensors without this one: the buckets' layouts stand
in it in figures. The file has three parts, and its hash is that of the bytes of the second:

    {"format": 2, "xxh3_128": "<32 hexadecimal digits>", "manifest":
    <a JSON object, in one or several lines>
    }

What grows with the size of a model stands beside each rank's file, in its `Index`: the hashes of
its blocks, and where the parts of shards lie. The manifest has the hash of that. In format 1 it had
all of it itself, which bounded a checkpoint to 2 TB.

What it guarantees: what `dump` has written `parsing.parse` reads. What it does not do: it reads no
file, and believes nothing about the files it describes.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic_core import from_json

from zerort import _core
from zerort.checkpoint.blocks import Hashes
from zerort.checkpoint.tensors import DTYPES
from zerort.errors import CheckpointError, PlanError

__all__ = [
    "ANCESTOR_LIMIT",
    "FORMAT",
    "FORMATS",
    "HEAD",
    "INDEX_LIMIT",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "SCRIPT",
    "TAIL",
    "TENSOR_LIMIT",
    "VALUE_LIMIT",
    "BucketEntry",
    "Counts",
    "Entry",
    "FileEntry",
    "Index",
    "Manifest",
    "OptimizerEntry",
    "ParamEntry",
    "ParamState",
    "SchedulerEntry",
    "TensorEntry",
    "count_values",
    "dump",
    "dump_index",
    "index_file",
    "is_file_of_checkpoint",
    "rank_file",
]

FORMAT = 2
"""That is written."""
FORMATS = (1, 2)
"""That are read."""
MANIFEST = "manifest.json"
SCRIPT = "zero_to_fp32.py"
MANIFEST_LIMIT = 64 << 20
"""Bytes of a manifest."""
INDEX_LIMIT = 64 << 20
"""Bytes of an index, which has room for the hashes of 2 TB."""
TENSOR_LIMIT = 10**6
VALUE_LIMIT = 6 * 10**6
"""JSON values of a manifest: a list of 30 million zeros would fit into the bytes, and not into
memory.
"""

HEAD = re.compile(rb'\{"format": (\d{1,9}), "xxh3_128": "([0-9a-f]{32})", "manifest":\n')
TAIL = b"\n}\n"

_Stop = Field(
    fail_fast=True
)  # at the first of many wrong values; an error for each of a million takes gigabytes
_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Blocks = Annotated[str, Field(pattern=r"^([0-9a-f]{32})*$")]
_Run = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
ANCESTOR_LIMIT = 256
"""Runs that a checkpoint remembers, the latest ones."""
_Code = Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]


def rank_file(rank: int) -> str:
    """The name of a rank's file of tensors."""
    return f"rank_{rank}.safetensors"


def index_file(file: str) -> str:
    """The name of what stands beside a rank's file."""
    return file.removesuffix(".safetensors") + ".json"


def is_file_of_checkpoint(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name."""
    of_rank = re.fullmatch(r"rank_\d{1,7}\.(safetensors|json)", name)
    return name in (MANIFEST, SCRIPT) or of_rank is not None


class Entry(BaseModel):
    """Part of a manifest: typed strictly, without keys of its own invention."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileEntry(Entry):
    """A file of the checkpoint, as it was written."""

    name: str
    bytes: _Count
    xxh3_128: _Digest
    """Of the digits in `blocks`."""
    blocks: _Blocks | None = None
    """xxh3-128 of each MiB, 32 digits each. None where they stand in the file's index."""

    def hashes(self, blocks: str | None = None) -> Hashes:
        """For the reader; with the index's `blocks` where it has none itself."""
        return Hashes(self.bytes, (self.blocks if blocks is None else blocks) or "")


class TensorEntry(Entry):
    """A tensor: bytes `start` to `end` of its file."""

    name: str
    file: str
    dtype: _Code
    shape: Annotated[tuple[_Count, ...], _Stop]
    start: _Count
    end: _Count
    runs: Annotated[tuple[tuple[_Count, _Count], ...], _Stop] | None = None
    """A part of a shard: (start, length), in elements of the shard, of the stretches that are
    stored, in order.
    """


class Index(Entry):
    """What stands beside a rank's file."""

    tensors: Annotated[tuple[TensorEntry, ...], _Stop]
    """The parts of shards in it, those that have `runs`."""
    blocks: _Blocks
    """Of the rank's file."""

    @cached_property
    def tensor(self) -> dict[str, TensorEntry]:
        """By name."""
        return {entry.name: entry for entry in self.tensors}


class ParamState(Entry):
    """What the optimizer keeps for a parameter."""

    values: dict[str, JsonValue]
    """What is one value for the whole parameter, such as a step count; encoded."""
    tensors: Annotated[tuple[str, ...], _Stop]
    """Keys of what has a value for each element; in the tensors `bucket.B.state.KEY`."""
    whole: Annotated[tuple[str, ...], _Stop] = ()
    """Keys of tensors of other shapes; in `optimizer.P.KEY` of the file of the rank that owned the
    parameter, rank 0's where all did.
    """


class ParamEntry(Entry):
    """A parameter that was in a bucket; its id P is its position."""

    name: str
    shape: Annotated[tuple[_Count, ...], _Stop]
    strides: Annotated[tuple[_Count, ...], _Stop]
    """How its elements lie in memory, hence in its bucket: dense, in any order of the dimensions.
    """
    dtype: Annotated[str, Field(pattern="^(F64|F32|F16|BF16)$")]
    group: _Count | None
    """Of the optimizer; None where no optimizer had it: its values are stored, in its own dtype."""
    frozen: bool
    stored: bool
    """False for a frozen parameter that was left out."""
    state: ParamState | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class BucketEntry(Entry):
    """Parameters in one flat buffer of `numel` elements, cut into one shard of `shard_numel` for
    each rank.
    """

    params: Annotated[tuple[_Count, ...], _Stop]
    offsets: Annotated[tuple[_Count, ...], _Stop]
    numel: _Count
    shard_numel: _Count
    dtypes: dict[str, _Code] = Field(default_factory=dict)
    """Of what is stored of it: of `master`, of `state.KEY`. In format 1 the tensors say it."""


class OptimizerEntry(Entry):
    """The optimizer's class and, for each of its groups, the options, encoded."""

    name: str
    groups: Annotated[tuple[dict[str, JsonValue], ...], _Stop]
    kinds: Annotated[tuple[str, ...], _Stop] = ()
    """The class of each group's optimizer, where there are several."""


class SchedulerEntry(Entry):
    """The learning-rate scheduler's class, with those of the schedulers in it, and its state,
    encoded.
    """

    name: str
    state: JsonValue


class Counts(Entry):
    """The engine's counters."""

    global_steps: _Count
    global_samples: _Count
    micro_steps: _Count
    skipped_steps: _Count


class Manifest(Entry):
    """A checkpoint. Parameters and buckets are numbered by their position."""

    zerort: str
    torch: str
    saved: Annotated[str, Field(max_length=64)]
    """When, in UTC, as ISO 8601."""
    saved_ns: _Count
    """The same in nanoseconds since 1970."""
    run: _Run
    """The run that saved it: one life of the training processes."""
    ancestors: Annotated[tuple[_Run, ...], Field(max_length=ANCESTOR_LIMIT)]
    """The runs that it goes on from, the latest first: that of the checkpoint it loaded, and so on.
    """
    world: Annotated[int, Field(ge=1, lt=1 << 20)]
    stage: Annotated[int, Field(ge=0, le=3)]
    plan_digest: str
    counters: Counts
    params: Annotated[tuple[ParamEntry, ...], _Stop]
    aliases: dict[str, str]
    """Further names of parameters and buffers, and the first name of each."""
    frozen: Annotated[tuple[str, ...], _Stop]
    """Names of the frozen parameters that were in no bucket: `param.NAME`, unless they were left
    out.
    """
    buckets: Annotated[tuple[BucketEntry, ...], _Stop]
    optimizer: OptimizerEntry | None
    """None where there was none: an engine that only ran forward has saved it."""
    scheduler: SchedulerEntry | None
    loss_scale: tuple[float, int, int, int] | None
    """Of a dynamic loss scale: the scale, hysteresis left, boundaries seen, boundary of the last
    overflow.
    """
    features: dict[str, JsonValue] = Field(default_factory=dict)
    """What features of the engine keep, by their section of the configuration; encoded."""
    client_state: JsonValue
    extra_state: dict[str, JsonValue]
    """What modules return from `get_extra_state`, by their name."""
    ranks: Annotated[tuple[dict[str, JsonValue], ...], _Stop]
    """State of each rank's own: random number generators, position in the data."""
    files: Annotated[tuple[FileEntry, ...], _Stop]
    tensors: Annotated[tuple[TensorEntry, ...], _Stop]
    """Without those of the indexes."""

    @cached_property
    def file(self) -> dict[str, FileEntry]:
        """Files by name."""
        return {entry.name: entry for entry in self.files}

    @cached_property
    def tensor(self) -> dict[tuple[str, str], TensorEntry]:
        """Tensors by file and name."""
        return {(entry.file, entry.name): entry for entry in self.tensors}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """For a tensor's name the first file that has it."""
        return {entry.name: entry.file for entry in reversed(self.tensors)}

    @cached_property
    def param(self) -> dict[str, int]:
        """Ids of the planned parameters, by name."""
        return {entry.name: index for index, entry in enumerate(self.params)}

    @cached_property
    def home(self) -> dict[int, int]:
        """Buckets of the planned parameters, by id."""
        return {
            param: index for index, bucket in enumerate(self.buckets) for param in bucket.params
        }

    @cached_property
    def dtype_of(self) -> dict[str, str]:
        """Dtype codes of tensors by name; the shards of a bucket have one."""
        return {
            **{entry.name: entry.dtype for entry in self.tensors},
            **{
                f"bucket.{index}.{kind}": code
                for index, bucket in enumerate(self.buckets)
                for kind, code in bucket.dtypes.items()
            },
        }

    @cached_property
    def plan(self) -> _core.Plan:
        """The layout from which the shards come. Raises `CheckpointError` when the buckets do not
        tile.
        """
        params: Any = [(entry.numel, entry.dtype.lower(), entry.group, 0) for entry in self.params]
        buckets = [(entry.params, entry.offsets, entry.numel) for entry in self.buckets]
        try:
            return _core.Plan.restore(params, buckets, world=self.world, stage=self.stage)
        except (PlanError, OverflowError) as error:
            raise CheckpointError(f"{MANIFEST}: the buckets are not a layout: {error}") from error


def dump(manifest: Manifest) -> bytes:
    """The file. Raises `CheckpointError` when a reader would not accept it: what cannot be loaded
    must not take the place of what can.
    """
    body = manifest.model_dump_json(exclude_defaults=True).encode()
    digest = xxhash.xxh3_128_hexdigest(body)
    head = f'{{"format": {FORMAT}, "xxh3_128": "{digest}", "manifest":\n'.encode()
    data = head + body + TAIL
    _check(data, len(manifest.tensors), MANIFEST_LIMIT, MANIFEST, body)
    return data


def dump_index(index: Index, name: str) -> bytes:
    """The file `name`. Raises as `dump`."""
    body = index.model_dump_json(exclude_defaults=True).encode()
    _check(body, len(index.tensors), INDEX_LIMIT, name, body)
    return body


def _check(data: bytes, tensors: int, limit: int, what: str, body: bytes) -> None:
    """Raises `CheckpointError` for what a reader would refuse."""
    values = count_values(body)
    if len(data) > limit or tensors > TENSOR_LIMIT or values > VALUE_LIMIT:
        raise CheckpointError(
            f"{what} has {len(data)} bytes, {tensors} tensors and {values} "
            f"values, the limits are {limit}, {TENSOR_LIMIT} and {VALUE_LIMIT}: use "
            "larger buckets or more ranks, or keep less in client_state, or keep it there in "
            "tensors"
        )
    try:
        from_json(body, cache_strings=False)  # its types were checked when it was made
    except ValueError as error:
        raise CheckpointError(f"{what} could not be read again: {error}") from error


def count_values(body: bytes) -> int:
    """At least as many as there are JSON values in it."""
    return 1 + sum(body.count(mark) for mark in (b",", b"[", b"{"))
