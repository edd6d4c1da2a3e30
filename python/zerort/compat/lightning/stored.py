"""Lightning's own dictionary in a checkpoint: loops, callbacks, hyper-parameters, schedulers.

It may hold any Python value, so it is what `torch.save` makes of it, as one tensor of bytes, which
is hashed and verified as every other. Reading it is `torch.load`'s, which takes plain values alone
unless it is told otherwise: nothing in a checkpoint runs unless the user has said so.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from zerort.errors import CheckpointError, ConfigError

__all__ = ["TAG", "folder_of", "mapped", "packed", "refuse_place", "unpacked"]

TAG = "checkpoint"
"""Of the one checkpoint in a folder that Lightning knows as a checkpoint."""

_KEY = "lightning"


def packed(state: Mapping[str, Any], tell: Callable[[str | None], str | None]) -> dict[str, Any]:
    """The client state that holds `state`, which is rank 0's.

    All ranks call it; `tell` hands every rank what rank 0 says. Raises `CheckpointError` on all of
    them for what cannot be pickled.
    """
    data, failure = io.BytesIO(), None
    try:
        torch.save(dict(state), data)
    except Exception as error:  # the user's classes take part
        failure = f"{type(error).__name__}: {error}"
    failure = tell(failure)
    if failure is not None:
        raise CheckpointError(
            f"Lightning's part of a checkpoint cannot be pickled on rank 0 ({failure}): keep such "
            "values out of hyper-parameters and of on_save_checkpoint"
        )
    return {_KEY: torch.frombuffer(bytearray(data.getbuffer()), dtype=torch.uint8)}


def unpacked(
    client_state: Mapping[str, Any], folder: Path, weights_only: bool | None
) -> dict[str, Any]:
    """What `packed` was given. Raises `CheckpointError` for a checkpoint of another program's, and
    for objects that are not to be made without `weights_only=False`.
    """
    if not isinstance(client_state, Mapping) or _KEY not in client_state:
        raise CheckpointError(
            f"{folder} is a checkpoint, but not one that Lightning wrote: load it with "
            "engine.load_checkpoint"
        )
    data = io.BytesIO(client_state[_KEY].cpu().numpy().tobytes())
    try:
        return dict(torch.load(data, map_location="cpu", weights_only=weights_only))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{folder}: Lightning's part holds objects that are not read by default: give their "
            "classes to torch.serialization.add_safe_globals, or weights_only=False to the "
            f"strategy where you trust who wrote it ({_found(error)})"
        ) from error


def _found(error: pickle.UnpicklingError) -> str:
    """What torch has met, without its advice."""
    text = str(error)
    return (text.partition("WeightsUnpickler error: ")[2] or text).partition(". Please")[0][:300]


def mapped(path: str, weights_only: bool | None) -> dict[str, Any]:
    """What Lightning's own format holds in one local file. Tensors stay in the file until they are
    read, so that ranks of a host share its pages.
    """
    found: dict[str, Any] = torch.load(
        path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=weights_only
    )
    return found


def refuse_place(path: Any) -> None:
    """Raises `ConfigError` for a place that is no folder of this machine."""
    if "://" in str(path):
        raise ConfigError(
            f"checkpoint {path}: only local folders can be written and read; copy it from or to "
            "where it is stored"
        )


def folder_of(path: Any) -> Path | None:
    """The folder of a checkpoint; None where `path` is a file, which is Lightning's own format.

    Raises `CheckpointError` for what is neither, `ConfigError` for a URL.
    """
    refuse_place(path)
    place = Path(path)
    if place.is_file():
        return None
    if not (place / TAG).is_dir():
        raise CheckpointError(
            f"{place} holds no folder {TAG!r}: give the path that Lightning saved to"
        )
    return place
