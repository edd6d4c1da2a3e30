"""A manifest's bytes, or an index's, from any source, as what can be relied on.

What it guarantees: a `Manifest` that `parse` returned is consistent in itself, and an `Index` that
`parse_index` did with its manifest. Every tensor lies inside its file, none overlaps another, the
runs of a shard fit into it, names of files cannot leave the folder. Refusing one takes no more
memory than accepting one of `VALUE_LIMIT` values. What it does not do: it looks at no file that the
manifest describes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import xxhash
from pydantic import ValidationError
from pydantic_core import from_json

from zerort.checkpoint.blocks import BLOCK
from zerort.checkpoint.manifest import (
    FORMATS,
    HEAD,
    INDEX_LIMIT,
    MANIFEST,
    SCRIPT,
    TAIL,
    TENSOR_LIMIT,
    VALUE_LIMIT,
    BucketEntry,
    Counts,
    Entry,
    FileEntry,
    Index,
    Manifest,
    OptimizerEntry,
    ParamEntry,
    ParamState,
    SchedulerEntry,
    TensorEntry,
    count_values,
    index_file,
    rank_file,
)
from zerort.checkpoint.tensors import size_of
from zerort.errors import CheckpointError

__all__ = ["parse", "parse_index"]

E = TypeVar("E", bound=Entry)

_OBJECTS: dict[str, type[Entry]] = {
    "counters": Counts,
    "optimizer": OptimizerEntry,
    "scheduler": SchedulerEntry,
}
_MAY_BE_NONE = ("optimizer", "scheduler")
_LISTS: dict[str, type[Entry]] = {
    "params": ParamEntry,
    "buckets": BucketEntry,
    "files": FileEntry,
    "tensors": TensorEntry,
}


def parse(data: bytes) -> Manifest:
    """The manifest in a file's bytes, checked. Raises `CheckpointError` saying what is wrong."""
    match = HEAD.match(data)
    if match is None or not data.endswith(TAIL):
        raise CheckpointError(
            f"{MANIFEST} is damaged: it does not begin and end as a manifest does"
        )
    number = int(match[1])
    if number not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise CheckpointError(f"{MANIFEST} has format {number}, this version reads format {known}")
    body = data[match.end() : -len(TAIL)]
    if xxhash.xxh3_128_hexdigest(body).encode() != match[2]:
        raise CheckpointError(f"{MANIFEST} is damaged: its hash is not the one it was written with")
    _check_keys(_raw(MANIFEST, body))
    manifest = _validated(MANIFEST, Manifest, body)
    for reason in _contradictions(manifest, number):
        raise CheckpointError(f"{MANIFEST} contradicts itself: {reason}")
    return manifest


def parse_index(data: bytes, manifest: Manifest, file: str) -> Index:
    """The index of a rank's `file`, checked against the manifest that has its hash. Raises
    `CheckpointError` saying what is wrong.
    """
    name = index_file(file)
    found = _raw(name, data)
    _compare_keys(name, found, Index)
    _compare_each(name, "tensors", found["tensors"], TensorEntry)
    index = _validated(name, Index, data)
    for reason in _index_contradictions(index, manifest, file):
        raise CheckpointError(f"{name} contradicts itself or {MANIFEST}: {reason}")
    return index


def _raw(name: str, body: bytes) -> Any:
    """What is in it, believed in nothing."""
    if (values := count_values(body)) > VALUE_LIMIT:
        raise CheckpointError(f"{name} has {values} values, more than the {VALUE_LIMIT} allowed")
    try:
        return from_json(body, cache_strings=False)
    except ValueError as error:
        raise CheckpointError(f"{name} is no JSON: {error}") from error


def _validated(name: str, model: type[E], body: bytes) -> E:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > 1000:  # which take a kilobyte each
            raise CheckpointError(
                f"{name} has {error.error_count()} values that do not belong there"
            ) from None
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{name}: {place}: {first['msg']}") from error


def _check_keys(found: Any) -> None:
    """Raises `CheckpointError` where an object has not the keys that it should have.

    pydantic would keep the whole object once for every key that is missing, and an error for every
    one too many.
    """
    _compare_keys(MANIFEST, found, Manifest)
    for key, model in _OBJECTS.items():
        if found[key] is not None or key not in _MAY_BE_NONE:
            _compare_keys(f"{MANIFEST}: {key}", found[key], model)
    aliases = found["aliases"]
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise CheckpointError(f"{MANIFEST}: aliases holds something else than names")
    for key, model in _LISTS.items():
        _compare_each(MANIFEST, key, found[key], model)


def _compare_each(name: str, key: str, found: object, model: type[Entry]) -> None:
    for index, entry in enumerate(found if isinstance(found, list) else ()):
        where = f"{name}: {key}.{index}"
        _compare_keys(where, entry, model)
        if model is ParamEntry and entry["state"] is not None:
            _compare_keys(f"{where}.state", entry["state"], ParamState)


def _compare_keys(where: str, found: object, model: type[Entry]) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is no object")
    missing = next(
        (
            key
            for key, field in model.model_fields.items()
            if field.is_required() and key not in found
        ),
        None,
    )
    if missing is not None:
        raise CheckpointError(f"{where} lacks the key {missing!r}")
    surplus = next((key for key in found if key not in model.model_fields), None)
    if surplus is not None:
        raise CheckpointError(f"{where} has the unknown key {surplus[:80]!r}")


def _contradictions(manifest: Manifest, number: int) -> Iterator[str]:
    if len(manifest.tensors) > TENSOR_LIMIT:
        yield f"{len(manifest.tensors)} tensors are more than {TENSOR_LIMIT}"
    of_ranks = {rank_file(rank) for rank in range(min(manifest.world, len(manifest.files)))}
    indexes = {index_file(name) for name in of_ranks} if number > 1 else set()
    count = manifest.world * (1 if number == 1 else 2) + 1
    if len(manifest.files) != count or manifest.file.keys() != {SCRIPT, *of_ranks, *indexes}:
        yield f"its files are not the {count} of a world of {manifest.world}"
    if len(manifest.ranks) != manifest.world:
        yield f"it holds the states of {len(manifest.ranks)} ranks of {manifest.world}"
    for entry in manifest.files:
        if (entry.blocks is None) != (number > 1 and entry.name in of_ranks):
            yield f"the blocks' hashes of {entry.name} are where they do not belong"
        elif entry.blocks is not None:
            yield from _mishashed(entry, entry.blocks)
        if entry.name in indexes and entry.bytes > INDEX_LIMIT:
            yield f"{entry.name} has {entry.bytes} bytes, more than {INDEX_LIMIT}"
    if len(manifest.param) != len(manifest.params) or len(manifest.tensor) != len(manifest.tensors):
        yield "a name stands twice"
    for param in manifest.params:
        if not _dense(param):
            strides, shape = list(param.strides), list(param.shape)
            yield f"the strides {strides} of {param.name} do not fill the shape {shape}"
    yield from _misplaced_tensors(manifest.tensors, manifest)
    yield from _misfitting_runs(manifest.tensors, manifest, parts=number == 1)
    yield from _misfilled_buckets(manifest, number)


def _index_contradictions(index: Index, manifest: Manifest, file: str) -> Iterator[str]:
    if len(index.tensors) > TENSOR_LIMIT:
        yield f"{len(index.tensors)} tensors are more than {TENSOR_LIMIT}"
    yield from _mishashed(manifest.file[file], index.blocks)
    if len(index.tensor) != len(index.tensors):
        yield "a name stands twice"
    for entry in index.tensors:
        known = manifest.dtype_of.get(entry.name)
        if entry.file != file:
            yield f"tensor {entry.name} lies in {entry.file!r}, not in {file}"
        if entry.runs is None or entry.dtype != known:
            yield f"tensor {entry.name} of {entry.dtype} is no part of a bucket, which has {known}"
    beside = [entry for entry in manifest.tensors if entry.file == file]
    yield from _misplaced_tensors((*index.tensors, *beside), manifest)
    yield from _misfitting_runs(index.tensors, manifest, parts=True)


def _mishashed(entry: FileEntry, blocks: str) -> Iterator[str]:
    if len(blocks) != 32 * -(-entry.bytes // BLOCK):
        yield f"{entry.name} has {entry.bytes} bytes and {len(blocks) // 32} blocks"
    if entry.hashes(blocks).xxh3_128 != entry.xxh3_128:
        yield f"the hash of {entry.name} is not that of its blocks' hashes"


def _dense(param: ParamEntry) -> bool:
    """Whether the strides give each element its own place, from 0 on without a gap."""
    if len(param.strides) != len(param.shape):
        return False
    end = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(param.strides, param.shape, strict=True)
    ):
        if size > 1 and param.numel:
            if stride != end:
                return False
            end *= size
    return True


def _misplaced_tensors(tensors: Sequence[TensorEntry], manifest: Manifest) -> Iterator[str]:
    ends: dict[str, int] = {}
    for entry in sorted(tensors, key=lambda entry: (entry.file, entry.start, entry.end)):
        if entry.file not in manifest.file:
            yield f"tensor {entry.name} lies in {entry.file!r}, which is no file of it"
        elif size_of(entry.dtype, entry.shape) != entry.end - entry.start:
            size = entry.end - entry.start
            yield f"tensor {entry.name}, {entry.dtype} {list(entry.shape)}, has {size} bytes"
        elif entry.start < ends.get(entry.file, 8) or entry.end > manifest.file[entry.file].bytes:
            yield f"tensor {entry.name} of {entry.file} overlaps its neighbour or the file's end"
        ends[entry.file] = entry.end


def _misfitting_runs(
    tensors: Sequence[TensorEntry], manifest: Manifest, *, parts: bool
) -> Iterator[str]:
    """`parts` of shards may be among them, or may not."""
    for entry in tensors:
        match = re.fullmatch(r"bucket\.(\d{1,9})\.(master|state\..+)", entry.name)
        if match is not None and not parts:
            yield f"tensor {entry.name} belongs into the index of its file"
        if (match is None) != (entry.runs is None):
            what = "have no" if match is None else "say which"
            yield f"tensor {entry.name} should {what} runs of a shard"
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


def _misfilled_buckets(manifest: Manifest, number: int) -> Iterator[str]:
    held = Counter[str]()
    # What is promised must be there before anybody makes room for it.
    room = sum(entry.bytes for entry in manifest.files)
    if number > 1 and sum(entry.numel for entry in manifest.params if entry.stored) > room:
        yield "its parameters are longer than all of its files"
    for entry in manifest.tensors:
        if entry.runs is not None:
            held[entry.name] += sum(length for _, length in entry.runs)
    for index, bucket in enumerate(manifest.buckets):
        if bucket.numel != manifest.world * bucket.shard_numel or len(bucket.params) != len(
            bucket.offsets
        ):
            size = f"{bucket.numel} elements in shards of {bucket.shard_numel}"
            yield f"bucket {index} is no layout: {size}"
        elif any(param >= len(manifest.params) for param in bucket.params):
            yield f"bucket {index} is no layout: it holds a parameter that is not there"
        elif number == 1 and (
            sum(manifest.params[p].numel for p in bucket.params if manifest.params[p].stored)
            > (held[f"bucket.{index}.master"])
        ):
            yield f"the parameters of bucket {index} are longer than what is stored of them"
