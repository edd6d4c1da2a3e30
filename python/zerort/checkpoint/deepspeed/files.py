"""The files of one DeepSpeed checkpoint, read without running anything that stands in them.

What it guarantees: torch's unpickler for weights alone reads them, which knows tensors and plain
values, and `argparse.Namespace`, which is one of names. Classes of DeepSpeed's stand in every such
file; they become inert records, and anything else is refused by its name before it is read, or, as
its reader asks, such a record too. Tensors are mapped from the files, not copied. What it does not
do: nothing here knows what the values mean.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zerort.checkpoint.tags import folder_of
from zerort.errors import CheckpointError

__all__ = ["Record", "Source", "holds_records", "open_source"]

VERSIONS = ("0.16", "0.17", "0.18", "0.19")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)(?:_\w+)?_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LATEST_LIMIT = 256


class Record:
    """Stands for an object: its arguments and attributes, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            vars(self).update(state)


def holds_records(value: Any) -> bool:
    """Whether an object stood somewhere in it."""
    if isinstance(value, argparse.Namespace):
        return holds_records(vars(value))
    if isinstance(value, dict):
        return any(map(holds_records, (*value, *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(holds_records, value))
    return isinstance(value, Record)


_RECORDS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_VALUES = {"argparse.Namespace": argparse.Namespace}


@dataclass(frozen=True)
class Source:
    """One checkpoint: a model file and an optimizer file for each rank, as far as there are."""

    path: Path
    models: Sequence[dict[str, Any]]
    """Of rank 0 alone below stage 3."""
    optimizers: Sequence[dict[str, Any]]
    """None at stage 0, whose optimizer stands in the model file, and in a universal checkpoint."""
    inert: bool = False
    """Objects are records."""

    @property
    def model(self) -> dict[str, Any]:
        """Rank 0's."""
        return self.models[0]

    @property
    def is_universal(self) -> bool:
        """Whether each parameter has files of its own."""
        return (self.path / "zero").is_dir()

    def read(self, *names: str) -> Any:
        """A further file of it."""
        return _load(self.path.joinpath(*names), inert=self.inert)


def open_source(folder: Path, tag: str | None, *, inert: bool = False) -> Source:
    """Reads `folder` / `tag`, by default what DeepSpeed's `latest` names. Raises `CheckpointError`
    for what is missing, cut, of another version or kind, or holds more than weights and values; of
    the last, with `inert`, there are records.
    """
    path = _find(folder_of(folder, "DS_DIR"), tag)
    names = sorted(entry.name for entry in path.iterdir())
    _refuse_other_kinds(path, names)
    models = _ordered(path, names, _MODEL, "model_states")
    optimizers = _ordered(path, names, _OPTIMIZER, "optim_states")
    if not models:
        raise CheckpointError(
            f"{path} holds no mp_rank_00_model_states.pt: it is no checkpoint of DeepSpeed's ZeRO"
        )
    read = [_read(path / name, inert) for name in models]
    for name, found in zip(models, read, strict=True):
        _check_model(path / name, found)
    return Source(path, read, [_read(path / name, inert) for name in optimizers], inert)


def _find(folder: Path, tag: str | None) -> Path:
    if tag is None and any(folder.glob("*_model_states.pt")):
        return folder
    if tag is None:
        latest = folder / "latest"
        if not latest.is_file() and (folder / "latest_universal").is_file():
            latest = folder / "latest_universal"
        if not latest.is_file():
            raise CheckpointError(f"{folder} has no file `latest`: name a tag")
        if latest.stat().st_size > _LATEST_LIMIT:
            raise CheckpointError(f"{latest} is too long to name a tag")
        tag = latest.read_text("utf-8", "replace").strip()
    if not tag or Path(tag).name != tag:
        raise CheckpointError(f"{tag!r} cannot be the tag of a checkpoint")
    path = folder / tag
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    return path


def _refuse_other_kinds(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if re.match(r"layer_\d+", name) or "_expert_" in name or "expp_rank" in name:
            raise CheckpointError(
                f"{path / name} is of pipeline or expert parallelism, which cannot be imported"
            )
        found = _MODEL.fullmatch(name) or _OPTIMIZER.fullmatch(name)
        if found and int(found[2]):
            raise CheckpointError(
                f"{path / name} is of tensor parallelism, which cannot be imported: merge the parts"
                " with DeepSpeed first"
            )


def _ordered(path: Path, names: Sequence[str], form: re.Pattern[str], what: str) -> list[str]:
    """Names by rank, without gaps."""
    found = {int(match[1] or 0): name for name in names if (match := form.fullmatch(name))}
    lacking = [rank for rank in range(len(found)) if rank not in found]
    if lacking:
        raise CheckpointError(f"{path} lacks the {what} file of rank {lacking[0]}")
    return [found[rank] for rank in sorted(found)]


def _read(path: Path, inert: bool) -> dict[str, Any]:
    """A file's dict, its tensors mapped from the file."""
    found = _load(path, inert=inert)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a dict")
    return found


def _load(path: Path, *, inert: bool) -> Any:
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link, which is not followed")
    try:
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:
        raise _damaged(path, error) from error
    strange = named - {*_RECORDS, *_VALUES}
    if strange and not inert:
        raise CheckpointError(
            f"{path} holds more than weights and values, and reading it would run code: "
            f"{', '.join(sorted(strange)[:8])}. Nothing of it was read; if it is your own "
            "client_state, leave such objects out with --skip-objects"
        )
    safe: Any = [*((Record, name) for name in (*_RECORDS, *strange)), *_VALUES.values()]
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    line = str(error).strip().partition("\n")[0]
    return CheckpointError(
        f"{path} does not read, it may be cut ({type(error).__name__}: {line[:160]})"
    )


def _check_model(path: Path, found: dict[str, Any]) -> None:
    version = found.get("ds_version")
    if not isinstance(version, str) or not version.startswith(tuple(f"{v}." for v in VERSIONS)):
        raise CheckpointError(
            f"{path} was written by DeepSpeed {version}, and those that can be imported are "
            f"{VERSIONS[0]} to {VERSIONS[-1]}"
        )
    if not isinstance(found.get("module"), dict):
        raise CheckpointError(f"{path} holds no state dict of a module")
    if found.get("mp_world_size") not in (None, 1):
        raise CheckpointError(
            f"{path} is one of {found['mp_world_size']} parts of a model, which cannot be imported"
        )
