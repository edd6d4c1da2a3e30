"""`zerort ckpt export`: a checkpoint in the formats of others.

`deepspeed-universal` is what DeepSpeed loads with `checkpoint: {load_universal: true}`, `dcp` is
torch.distributed.checkpoint's, written by its own writer, `safetensors` the fp32 weights alone.
What is written is verified on the way, and stands under its name when it is complete. Parameters
are read some at a time; only `dcp` holds all at once, for its writer takes a state dict.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from zerort.checkpoint.client import SavedClientState, check_permission
from zerort.checkpoint.encoding import decode
from zerort.checkpoint.export import open_checkpoint, saved_tensors
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import Manifest, rank_file
from zerort.checkpoint.reading import Reader
from zerort.checkpoint.tags import folder_of
from zerort.checkpoint.temporary import new_nonce, temporary_path
from zerort.checkpoint.tensors import DTYPES
from zerort.errors import CheckpointError

__all__ = ["FORMATS", "ExportOptions", "export_checkpoint"]

_AT_ONCE = 1 << 26
"""Elements that are read before they are written."""
_DEEPSPEED = "0.19.8"
"""The version whose form this is."""


@dataclass(frozen=True)
class ExportOptions:
    """How the files are cut."""

    ranks: int = 1
    """Of a run at stage 3 that DeepSpeed will load it in: each reads a model file of its own."""
    limit: int = 5 * 10**9
    """Bytes of a file of weights."""


def export_checkpoint(
    folder: Path, tag: str | None, out: Path, form: str, options: ExportOptions | None = None
) -> Path:
    """Writes `folder` / `tag`, by default what `latest` names, as the new folder `out`. Raises
    `CheckpointError` and `OSError`, and then there is no such folder.
    """
    reader, disk = open_checkpoint(folder, tag), Disk()
    out = folder_of(out, "OUT")
    if disk.exists(out):
        raise CheckpointError(f"{out} exists already: name a new folder")
    disk.make_folders(out.parent)
    made = temporary_path(out.parent, out.name, new_nonce())
    disk.make_folder(made)
    try:
        FORMATS[form](reader, made, options or ExportOptions())
        disk.sync_tree(made)
        disk.rename(made, out)
        disk.sync_folder(out.parent)
    finally:
        if disk.exists(made):
            disk.remove_tree(made)
    return out


def _universal(reader: Reader, out: Path, options: ExportOptions) -> None:
    manifest, tag = reader.manifest, reader.folder.name
    zero = out / tag / "zero"
    zero.mkdir(parents=True)
    steps: set[float] = set()
    for name, kinds, values in _parameters(reader):
        home = zero / _plain(name)
        home.mkdir()
        for kind, tensor in kinds.items():
            torch.save({"cat_dim": 0, "param": tensor}, home / f"{kind}.pt")
        if "step" in values:
            step = torch.as_tensor(values["step"], dtype=torch.float32)
            steps.add(float(step))
            torch.save(step, home / "step.pt")
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have taken {min(steps):g} to {max(steps):g} steps, and DeepSpeed's form "
            "has one count for all of a group"
        )
    loose = {}
    for name, tensor in _loose(reader):
        (zero / _plain(name)).mkdir()
        torch.save({"cat_dim": 0, "param": tensor}, zero / name / "fp32.pt")
        loose[name] = tensor
    torch.save(_common(reader, steps), zero / "optimizer_state.pt")
    model = _model(reader, loose)
    torch.save(model, out / tag / "mp_rank_00_model_states.pt")
    for rank in range(options.ranks if manifest.stage == 3 or options.ranks > 1 else 0):
        torch.save(model, out / tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (out / "latest_universal").write_text(tag)


def _common(reader: Reader, steps: set[float]) -> dict[str, Any]:
    groups = [dict(group, params=[at]) for at, group in enumerate(_groups(reader))]
    state = {0: {"step": torch.tensor(steps.pop())}} if steps else {0: {"step": torch.tensor(0.0)}}
    return {
        "param_groups": groups,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
        "dynamic_loss_scale": reader.manifest.loss_scale is not None,
        "overflow": False,
        "ds_version": _DEEPSPEED,
    }


def _model(reader: Reader, loose: dict[str, Tensor]) -> dict[str, Any]:
    manifest = reader.manifest
    counts = manifest.counters
    check_permission(manifest.client_state, allow_pickle=False)
    kept = SavedClientState(manifest.client_state, lambda name: reader.whole(rank_file(0), name))
    schedule = None
    if manifest.scheduler is not None:
        schedule = reader.value(manifest.scheduler.state)
    reader.fill()
    client = kept.open()
    buffers = [e.name.partition(".")[2] for e in manifest.tensors if e.name.startswith("buffer.")]
    own = {
        "module": loose,
        "buffer_names": buffers,
        "optimizer": None,
        "param_shapes": _shapes(manifest),
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": dict(manifest.aliases),
        "lr_scheduler": schedule,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": counts.skipped_steps,
        "global_steps": counts.global_steps,
        "global_samples": counts.global_samples,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": _told(manifest),
        "ds_version": _DEEPSPEED,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    return {**(client if isinstance(client, dict) else {}), **own}


def _told(manifest: Manifest) -> dict[str, Any]:
    """What a configuration would say: the classes, by which an import knows them."""
    named = {"optimizer": manifest.optimizer, "scheduler": manifest.scheduler}
    return {key: {"type": saved.name} for key, saved in named.items() if saved and saved.name}


def _shapes(manifest: Manifest) -> list[dict[str, torch.Size]]:
    shapes: list[dict[str, torch.Size]] = [{} for _ in _saved_groups(manifest)]
    for entry in manifest.params:
        if entry.group is not None:
            shapes[entry.group][entry.name] = torch.Size(entry.shape)
    return shapes


def _dcp(reader: Reader, out: Path, options: ExportOptions) -> None:
    manifest = reader.manifest
    model: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for name, kinds, values in _parameters(reader):
        model[name] = kinds.pop("fp32")
        if kinds or values:
            state[name] = {**kinds, **values}
    model |= dict(_loose(reader))
    model |= {alias: model[name] for alias, name in manifest.aliases.items() if name in model}
    names: list[list[str]] = [[] for _ in _saved_groups(manifest)]
    for entry in manifest.params:
        if entry.group is not None:
            names[entry.group].append(entry.name)
    groups = [{**group, "params": held} for group, held in zip(_groups(reader), names, strict=True)]
    whole = {"model": model, "optimizer": {"state": state, "param_groups": groups}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save_distributed(whole, storage_writer=FileSystemWriter(out), no_dist=True)


def _safetensors(reader: Reader, out: Path, options: ExportOptions) -> None:
    every = saved_tensors(reader.folder.parent, reader.folder.name)
    tensors = {name: saved for name, saved in every.items() if name not in reader.manifest.aliases}
    parts: list[list[str]] = [[]]
    sizes = {name: saved.numel() * saved.dtype.itemsize for name, saved in tensors.items()}
    for name in tensors:
        if parts[-1] and sum(sizes[one] for one in parts[-1]) + sizes[name] > options.limit:
            parts.append([])
        parts[-1].append(name)
    files = ["model.safetensors"]
    if len(parts) > 1:
        count = len(parts)
        files = [f"model-{at + 1:05d}-of-{count:05d}.safetensors" for at in range(count)]
    for file, names in zip(files, parts, strict=True):
        found = {name: tensors[name].contiguous() for name in names}
        save_file(found, out / file, metadata={"format": "pt"})
    where = {name: file for file, names in zip(files, parts, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


FORMATS: dict[str, Callable[[Reader, Path, ExportOptions], None]] = {
    "deepspeed-universal": _universal,
    "dcp": _dcp,
    "safetensors": _safetensors,
}


# What they have in common.


def _parameters(reader: Reader) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
    """Name, `fp32` and state in the parameter's shape, single values, of each planned parameter;
    read some at a time.
    """
    manifest = reader.manifest
    waiting: list[tuple[str, dict[str, Tensor], dict[str, Any]]] = []
    elements = 0
    for param, entry in enumerate(manifest.params):
        if not entry.stored:
            continue
        kinds = {"fp32": reader.planned(param)}
        kept = entry.state
        for key in kept.tensors if kept else ():
            kinds[key] = _shaped(reader, param, key)
        for key in kept.whole if kept else ():
            kinds[key] = reader.of_optimizer(param, key)
        values = {k: decode(v, _no_tensor) for k, v in kept.values.items()} if kept else {}
        waiting.append((entry.name, kinds, values))
        elements += entry.numel * len(kinds)
        if elements > _AT_ONCE:
            reader.fill()
            yield from waiting
            waiting, elements = [], 0
    reader.fill()
    yield from waiting


def _shaped(reader: Reader, param: int, key: str) -> Tensor:
    saved = reader.manifest.params[param]
    code = reader.manifest.dtype_of[f"bucket.{reader.manifest.home[param]}.state.{key}"]
    flat = reader.flat(param, f"state.{key}", DTYPES[code])
    into = torch.empty(saved.shape, dtype=flat.dtype)
    reader.then(lambda: into.copy_(flat.as_strided(saved.shape, saved.strides)))
    return into


def _no_tensor(name: str) -> Tensor:
    raise CheckpointError(f"a single value of the optimizer names tensor {name}")


def _loose(reader: Reader) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and parameters that are in no bucket."""
    for entry in reader.manifest.tensors:
        kind, _, name = entry.name.partition(".")
        if kind in ("param", "buffer"):
            found = reader.whole(rank_file(0), entry.name)
            reader.fill()
            yield name, found


def _groups(reader: Reader) -> Sequence[dict[str, Any]]:
    groups = [
        {key: reader.value(value) for key, value in group.items()}
        for group in _saved_groups(reader.manifest)
    ]
    reader.fill()
    return groups


def _saved_groups(manifest: Manifest) -> Sequence[dict[str, Any]]:
    """Options as they were saved; an engine that only runs forward has no optimizer."""
    return () if manifest.optimizer is None else manifest.optimizer.groups


def _plain(name: str) -> str:
    """The name, which becomes a folder's."""
    if not name or Path(name).name != name or name in (".", "..") or "\\" in name:
        raise CheckpointError(f"{name!r} cannot be the name of a folder, which this format needs")
    return name
