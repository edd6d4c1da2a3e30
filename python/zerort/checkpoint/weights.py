"""One file of a running module's weights, in the dtypes that it computes with, for other programs.

The file is complete under its name or not there. While it is written it has a temporary name and a
lock, so that another job's export of the same name lets it be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from zerort.checkpoint.blocks import HashedFile
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import MANIFEST
from zerort.checkpoint.tags import reserved
from zerort.checkpoint.temporary import named_for, new_nonce, temporary_path
from zerort.checkpoint.tensors import Stored, as_bytes, place
from zerort.errors import CheckpointError

__all__ = ["save_weights"]


def save_weights(
    weights: dict[str, Tensor], tied: dict[str, str], folder: Path, name: str, disk: Disk
) -> None:
    """Writes `weights` in their own dtypes into `folder` / `name`, by a temporary file and a
    rename; `tied` maps further names of a tensor to its first.

    A name that ends in `.safetensors` gives that format, in which a tied weight stands once, under
    its first name; any other name gives torch's zip format, which `torch.load(weights_only=True)`
    reads. What an export of this name that died has left is deleted. Raises `CheckpointError` for a
    name or a place that could be something else, and `OSError`.
    """
    _check_place(disk, folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    _delete_unfinished(disk, folder, name)
    temporary = temporary_path(folder, name, new_nonce())
    try:
        with HashedFile(disk, temporary) as file:
            file.hold()
            if name.endswith(".safetensors"):
                _write_safetensors(file, weights, tied)
            else:
                torch.save(weights, cast(BinaryIO, _Stream(file)))
            file.finish()
        disk.replace(temporary, folder / name)
        disk.sync_folder(folder)
    finally:
        if disk.exists(temporary):
            disk.remove_file(temporary)


def _check_place(disk: Disk, folder: Path, name: str) -> None:
    if not name or Path(name).name != name or name.startswith(".") or reserved(name):
        raise CheckpointError(
            f"{name!r} cannot be the name of a file of weights: no folders, no dot first, and no "
            "name of a checkpoint's own files"
        )
    if disk.exists(folder / MANIFEST):
        raise CheckpointError(
            f"{folder} is a checkpoint, and with a file more it could not be loaded: save the "
            "weights beside it"
        )


def _delete_unfinished(disk: Disk, folder: Path, name: str) -> None:
    """What exports of this name have left that died."""
    for found in disk.names(folder):
        path = folder / found
        if named_for(name, found) and disk.is_plain(path) and not disk.in_use(path):
            disk.remove_file(path)


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
