"""A manifest's bytes, from any source, as a `Manifest` that can be relied on.

What it guarantees: a `Manifest` that `parse` returned is consistent in itself. Every tensor lies
inside its file, none overlaps another, the runs of a shard fit into it, names of files cannot leave
the folder. Refusing one takes no more memory than accepting one of `VALUE_LIMIT` values. What it
does not do: it looks at no file that the manifest describes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import xxhash
from pydantic import ValidationError
from pydantic_core import from_json

from zerort.checkpoint.blocks import BLOCK
from zerort.checkpoint.manifest import (
    FORMAT,
    HEAD,
    MANIFEST,
    SCRIPT,
    TAIL,
    TENSOR_LIMIT,
    VALUE_LIMIT,
    BucketEntry,
    Counts,
    Entry,
    FileEntry,
    Manifest,
    OptimizerEntry,
    ParamEntry,
    ParamState,
    SchedulerEntry,
    TensorEntry,
    count_values,
    rank_file,
)
from zerort.checkpoint.tensors import size_of
from zerort.errors import CheckpointError

__all__ = ["parse"]

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
    if int(match[1]) != FORMAT:
        raise CheckpointError(
            f"{MANIFEST} has format {int(match[1])}, this version reads format {FORMAT}"
        )
    body = data[match.end() : -len(TAIL)]
    if xxhash.xxh3_128_hexdigest(body).encode() != match[2]:
        raise CheckpointError(f"{MANIFEST} is damaged: its hash is not the one it was written with")
    if (values := count_values(body)) > VALUE_LIMIT:
        raise CheckpointError(
            f"{MANIFEST} has {values} values, more than the {VALUE_LIMIT} allowed"
        )
    _check_keys(body)
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > 1000:  # which take a kilobyte each
            raise CheckpointError(
                f"{MANIFEST} has {error.error_count()} values that do not belong there"
            ) from None
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{MANIFEST}: {place}: {first['msg']}") from error
    for reason in _contradictions(manifest):
        raise CheckpointError(f"{MANIFEST} contradicts itself: {reason}")
    return manifest


def _check_keys(body: bytes) -> None:
    """Raises `CheckpointError` where an object has not the keys that it should have.

    pydantic would keep the whole object once for every key that is missing, and an error for every
    one too many.
    """
    try:
        found = from_json(body, cache_strings=False)
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is no JSON: {error}") from error
    _compare_keys(MANIFEST, found, Manifest)
    for key, model in _OBJECTS.items():
        if found[key] is not None or key not in _MAY_BE_NONE:
            _compare_keys(f"{MANIFEST}: {key}", found[key], model)
    aliases = found["aliases"]
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise CheckpointError(f"{MANIFEST}: aliases holds something else than names")
    for key, model in _LISTS.items():
        for index, entry in enumerate(found[key] if isinstance(found[key], list) else ()):
            where = f"{MANIFEST}: {key}.{index}"
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


def _contradictions(manifest: Manifest) -> Iterator[str]:
    if len(manifest.tensors) > TENSOR_LIMIT:
        yield f"{len(manifest.tensors)} tensors are more than {TENSOR_LIMIT}"
    expected = {
        SCRIPT,
        *(rank_file(rank) for rank in range(min(manifest.world, len(manifest.files)))),
    }
    if len(manifest.files) != manifest.world + 1 or manifest.file.keys() != expected:
        yield f"its files are not the {manifest.world + 1} of a world of {manifest.world}"
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
            strides, shape = list(param.strides), list(param.shape)
            yield f"the strides {strides} of {param.name} do not fill the shape {shape}"
    yield from _misplaced_tensors(manifest)
    yield from _misfitting_runs(manifest)
    yield from _misfilled_buckets(manifest)


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


def _misplaced_tensors(manifest: Manifest) -> Iterator[str]:
    ends: dict[str, int] = {}
    for entry in sorted(manifest.tensors, key=lambda entry: (entry.file, entry.start, entry.end)):
        if entry.file not in manifest.file:
            yield f"tensor {entry.name} lies in {entry.file!r}, which is no file of it"
        elif size_of(entry.dtype, entry.shape) != entry.end - entry.start:
            size = entry.end - entry.start
            yield f"tensor {entry.name}, {entry.dtype} {list(entry.shape)}, has {size} bytes"
        elif entry.start < ends.get(entry.file, 8) or entry.end > manifest.file[entry.file].bytes:
            yield f"tensor {entry.name} of {entry.file} overlaps its neighbour or the file's end"
        ends[entry.file] = entry.end


def _misfitting_runs(manifest: Manifest) -> Iterator[str]:
    for entry in manifest.tensors:
        match = re.fullmatch(r"bucket\.(\d{1,9})\.(master|state\..+)", entry.name)
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


def _misfilled_buckets(manifest: Manifest) -> Iterator[str]:
    held = Counter[str]()
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
        # What is promised must be there before anybody makes room for it.
        elif (
            sum(manifest.params[p].numel for p in bucket.params if manifest.params[p].stored)
            > (held[f"bucket.{index}.master"])
        ):
            yield f"the parameters of bucket {index} are longer than what is stored of them"
