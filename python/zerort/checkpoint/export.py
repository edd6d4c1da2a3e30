"""Weights for other programs: one state dict out of a checkpoint, or out of a running engine.

From a checkpoint come the fp32 masters, read and verified as a load does; from an engine the
parameters as the module computes with them. Nothing here needs the number of ranks that saved.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from zerort import _core
from zerort.checkpoint.blocks import HashedFile
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import Manifest, ParamEntry, rank_file
from zerort.checkpoint.parsing import parse
from zerort.checkpoint.reading import Reader, Shard
from zerort.checkpoint.state import aliases
from zerort.checkpoint.tags import LATEST, TEMPORARY, latest, read_manifest
from zerort.checkpoint.tensors import DTYPES, Stored, as_bytes, place
from zerort.errors import CheckpointError

__all__ = [
    "get_fp32_state_dict",
    "load_state_dict_from_zero_checkpoint",
    "save_weights",
    "state_dict_of",
]


def get_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> dict[str, Tensor]:
    """The fp32 masters of a checkpoint, with buffers, under the module's names, on CPU; aliases
    share a tensor.

    `tag` is what `latest` names when left out. Floating-point values of other dtypes are cast.
    Raises `CheckpointError` for a checkpoint that is missing or damaged.
    """
    disk, folder = Disk(), Path(checkpoint_dir)
    found = tag if tag is not None else latest(disk, folder)
    if found is None:
        raise CheckpointError(f"{folder} has no file `{LATEST}`: name a tag")
    manifest = parse(read_manifest(disk, folder, found))
    reader = Reader(disk, folder / found, manifest)
    reader.check_names()
    reader.check_sizes()
    return state_dict_of(reader, exclude_frozen=exclude_frozen_parameters)


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Loads a checkpoint's weights into a plain module, on CPU, and returns it. Raises as
    `get_fp32_state_dict`.
    """
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict(checkpoint_dir, tag), strict=False)
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
        Shard(plan, 0).want(reader, bucket.id, "master", origins, flat)
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
    return tensor.float() if tensor.is_floating_point() else tensor


def save_weights(
    module: nn.Module, folder: Path, name: str, disk: Disk, *, exclude_frozen: bool
) -> None:
    """Writes a module's state dict in its own dtypes into `folder` / `name`, by a temporary file
    and a rename.

    A name that ends in `.safetensors` gives that format, in which a tied weight stands once, under
    its first name; any other name gives torch's zip format, which `torch.load(weights_only=True)`
    reads. What an export that died left of this file is deleted. Raises `CheckpointError` for a
    name that could be something else, and `OSError`.
    """
    if not name or Path(name).name != name or name.startswith(".") or name == LATEST:
        raise CheckpointError(
            f"{name!r} cannot be the name of a file of weights: no folders, no dot first, not "
            f"{LATEST!r}"
        )
    path = folder / name
    frozen = {
        name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    weights = {
        name: value.detach()
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and not (exclude_frozen and name in frozen)
    }
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY}{name}-"
    for left in disk.names(folder):
        if re.fullmatch(re.escape(prefix) + "[0-9a-f]{16}", left):
            disk.remove_file(folder / left)
    temporary = folder / (prefix + token_hex(8))
    try:
        with HashedFile(disk, temporary) as file:
            if path.suffix == ".safetensors":
                _write_safetensors(file, weights, aliases(module))
            else:
                torch.save(weights, cast(BinaryIO, _Stream(file)))
            file.finish()
        disk.replace(temporary, path)
        disk.sync_folder(folder)
    finally:
        if disk.exists(temporary):
            disk.remove_file(temporary)


def _write_safetensors(file: HashedFile, weights: dict[str, Tensor], tied: dict[str, str]) -> None:
    once = {name: tensor for name, tensor in weights.items() if tied.get(name) not in weights}
    head, placed = place([Stored.of(name, tensor) for name, tensor in once.items()])
    file.write(head)
    for stored, _ in placed:
        for piece in stored.pieces:
            file.write(as_bytes(piece))


class _Stream:
    """What torch.save needs of a file."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Appends `data`."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is kept back."""
