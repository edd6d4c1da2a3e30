"""Weights for other programs: one state dict out of a checkpoint.

They are the fp32 masters, read and verified as a load does. Nothing here needs the number of ranks
that saved. `weights` has what a running engine exports.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zerort import _core
from zerort.checkpoint.client import SavedClientState, check_permission
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import Manifest, ParamEntry, rank_file
from zerort.checkpoint.parsing import parse
from zerort.checkpoint.reading import Reader, Shard
from zerort.checkpoint.tags import LATEST, folder_of, latest, read_manifest
from zerort.checkpoint.tensors import DTYPES
from zerort.errors import CheckpointError
from zerort.params.sharded import keeper_of
from zerort.zero import GatheredParameters

__all__ = [
    "SavedTensor",
    "get_client_state",
    "get_fp32_state_dict",
    "load_state_dict_from_zero_checkpoint",
    "open_checkpoint",
    "saved_tensors",
    "state_dict_of",
]


_HALF = (torch.float16, torch.bfloat16)


def open_checkpoint(checkpoint_dir: str | os.PathLike[str], tag: str | None = None) -> Reader:
    """A reader of one checkpoint, by default of the one that `latest` names. Raises
    `CheckpointError` for one that is missing or not complete.
    """
    disk, folder = Disk(), folder_of(checkpoint_dir, "checkpoint_dir")
    found = tag if tag is not None else latest(disk, folder)
    if found is None:
        raise CheckpointError(f"{folder} has no file `{LATEST}`: name a tag")
    reader = Reader(disk, folder / found, parse(read_manifest(disk, folder, found)))
    reader.check_names()
    reader.check_sizes()
    return reader


def get_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> dict[str, Tensor]:
    """The fp32 masters of a checkpoint, with buffers, under the module's names, on CPU; aliases
    share a tensor.

    `tag` is what `latest` names when left out. What has no master is cast where it is of 16 bits in
    floating point, and has its own dtype otherwise.
    Raises `CheckpointError` for a checkpoint that is missing or damaged.
    """
    reader = open_checkpoint(checkpoint_dir, tag)
    return state_dict_of(reader, exclude_frozen=exclude_frozen_parameters)


def get_client_state(
    checkpoint_dir: str | os.PathLike[str], tag: str | None = None, *, allow_pickle: bool = False
) -> Any:
    """The client state that a checkpoint was saved with, its tensors on CPU. Objects in it are
    unpickled only with `allow_pickle`. Arguments and errors are those of `get_fp32_state_dict`.
    """
    reader = open_checkpoint(checkpoint_dir, tag)
    encoded = reader.manifest.client_state
    check_permission(encoded, allow_pickle=allow_pickle)
    found = SavedClientState(encoded, lambda name: reader.whole(rank_file(0), name))
    reader.fill()
    return found.open()


@dataclass(frozen=True)
class SavedTensor:
    """A weight of a checkpoint that has not been read: a master in fp32, or what has none."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    _reader: Reader
    _source: int | str
    """The id of a planned parameter, or the name of a tensor in rank 0's file."""

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def contiguous(self) -> Tensor:
        """Reads and verifies it. Raises `CheckpointError` where it is damaged."""
        source, reader = self._source, self._reader
        if isinstance(source, int):
            found = reader.planned(source)
        else:
            found = reader.whole(rank_file(0), source)
        reader.fill()
        return found.to(self.dtype)


def saved_tensors(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    *,
    exclude_frozen: bool = False,
) -> dict[str, SavedTensor]:
    """What `get_fp32_state_dict` returns, read when it is asked for. Raises as it does."""
    reader = open_checkpoint(checkpoint_dir, tag)
    manifest = reader.manifest
    found: dict[str, SavedTensor] = {}
    for entry in manifest.tensors:
        kind, _, name = entry.name.partition(".")
        if kind in ("param", "buffer") and not (exclude_frozen and name in manifest.frozen):
            dtype = _as_fp32(DTYPES[entry.dtype])
            found[name] = SavedTensor(name, torch.Size(entry.shape), dtype, reader, entry.name)
    for param, saved in enumerate(manifest.params):
        if saved.stored and not (exclude_frozen and saved.frozen):
            dtype = _as_fp32(DTYPES[saved.dtype])
            shape = torch.Size(saved.shape)
            found[saved.name] = SavedTensor(saved.name, shape, dtype, reader, param)
    return found | {alias: found[name] for alias, name in manifest.aliases.items() if name in found}


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Loads a checkpoint's weights into a plain module, on CPU, and returns it; a module in shards
    stays where it is, and all ranks call this. Raises as `get_fp32_state_dict`.
    """
    params = list(model.parameters())
    if all(keeper_of(parameter) is None for parameter in params):
        model = model.cpu()
    weights = get_fp32_state_dict(checkpoint_dir, tag)
    with GatheredParameters(params, modifier_rank=0):
        model.load_state_dict(weights, strict=False)
    return model


def state_dict_of(
    reader: Reader, *, as_saved: bool = False, exclude_frozen: bool = False
) -> dict[str, Tensor]:
    """All weights of a checkpoint. With `as_saved` in the dtypes of the module that saved it, else
    in fp32.
    """
    manifest = reader.manifest
    plan = _one_rank(manifest)
    origins = [param if entry.stored else -1 for param, entry in enumerate(manifest.params)]
    found: dict[str, Tensor] = {}
    flats = []
    for bucket in plan.buckets:
        flat = torch.zeros(
            bucket.numel, dtype=torch.float64 if bucket.dtype == "f64" else torch.float32
        )
        Shard(plan, 0, origins).want(reader, bucket, "master", flat)
        flats.append(flat)
    for entry in manifest.tensors:
        kind, _, name = entry.name.partition(".")
        if kind in ("param", "buffer") and not (exclude_frozen and name in manifest.frozen):
            found[name] = reader.whole(rank_file(0), entry.name)
    reader.fill()
    for bucket, flat in zip(plan.buckets, flats, strict=True):
        for param, offset in zip(bucket.params, bucket.offsets, strict=True):
            saved = manifest.params[param]
            if saved.stored and not (exclude_frozen and saved.frozen):
                found[saved.name] = _shaped(flat, offset, saved)
    dtypes = {entry.name: DTYPES[entry.dtype] for entry in manifest.params} if as_saved else {}
    cast = {name: _cast(tensor, dtypes.get(name), as_saved) for name, tensor in found.items()}
    return cast | {alias: cast[name] for alias, name in manifest.aliases.items() if name in cast}


def _one_rank(manifest: Manifest) -> _core.Plan:
    params: Any = [(entry.numel, entry.dtype.lower(), entry.group, 0) for entry in manifest.params]
    return _core.Plan(params, world=1, stage=0, cap_bytes=1 << 26)


def _shaped(flat: Tensor, offset: int, saved: ParamEntry) -> Tensor:
    """A parameter out of the flat buffer, contiguous, in memory of its own."""
    return torch.as_strided(flat, saved.shape, saved.strides, offset).clone(
        memory_format=torch.contiguous_format
    )


def _cast(tensor: Tensor, dtype: torch.dtype | None, as_saved: bool) -> Tensor:
    if as_saved:
        return tensor if dtype is None else tensor.to(dtype)
    return tensor.to(_as_fp32(tensor.dtype))


def _as_fp32(dtype: torch.dtype) -> torch.dtype:
    """What a weight has in an export to fp32."""
    return torch.float32 if dtype in _HALF else dtype
