"""DeepSpeed's checkpoints as this program's: one rank's, which any number of ranks load.

Masters and optimizer state are written out of the mapped files as they lie there, a piece at a
time, by the same protocol as a save: what appears under the tag is complete.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import time_ns
from typing import Any

import torch
from torch import Tensor

from zerort import _core
from zerort.checkpoint.client import encode_client_state
from zerort.checkpoint.deepspeed.files import Record, Source, holds_records, open_source
from zerort.checkpoint.deepspeed.layout import Layout, Parameter, as_laid_out, layout_of
from zerort.checkpoint.deepspeed.universal import universal_layout
from zerort.checkpoint.encoding import encode
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import ParamState
from zerort.checkpoint.save import Save, SaveOptions
from zerort.checkpoint.snapshot import Snapshot
from zerort.checkpoint.state import strides_of
from zerort.checkpoint.tags import check_tag, folder_of
from zerort.checkpoint.tensors import CODES, Stored
from zerort.errors import CheckpointError
from zerort.mesh.local import LocalControl

__all__ = ["ImportOptions", "Imported", "import_checkpoint"]

_log = logging.getLogger("zerort")

_OWN = frozenset(
    {
        *("module", "buffer_names", "optimizer", "lr_scheduler", "data_sampler", "random_ltd"),
        *("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
        *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
        *("ds_config", "ds_version", "sparse_tensor_module_names"),
        *("checkpoint_parallel_dimensions", "universal_checkpoint_info"),
        "ds_autotp_universal_checkpoint_meta",
    }
)
"""Keys of a model file that are not the caller's."""
_BUCKET = 1 << 26
"""Bytes of fp32 that a bucket may have."""


@dataclass
class Imported:
    """What an import has done."""

    path: Path
    parameters: int = 0
    frozen: int = 0
    buffers: int = 0
    notes: list[str] = field(default_factory=list)
    """What was not taken, a sentence each."""


@dataclass(frozen=True)
class ImportOptions:
    """What the files do not say."""

    optimizer: str | None = None
    scheduler: str | None = None
    names: Sequence[str] | None = None
    """Of the parameters, in the optimizer's order."""
    skip_objects: bool = False
    """What of `client_state` holds objects is left out."""


def import_checkpoint(
    folder: Path, tag: str | None, out: Path, options: ImportOptions | None = None
) -> Imported:
    """Writes `folder` / `tag` of DeepSpeed's as `out` / tag. Raises `CheckpointError` and
    `OSError`, and then nothing stands under that tag.
    """
    options = options or ImportOptions()
    source = open_source(folder, tag, inert=options.skip_objects)
    layout = universal_layout(source) if source.is_universal else layout_of(source, options.names)
    name = check_tag(source.path.resolve().name)
    target = folder_of(out, "OUT")
    if (target / name).resolve() == source.path.resolve():
        raise CheckpointError(f"{target / name} is the checkpoint itself: name another folder")
    done = Imported(target / name)
    with as_laid_out(source):
        snapshot = _Conversion(source, layout, options, done).snapshot()
    Save(LocalControl(), Disk(), target, name, SaveOptions()).run(snapshot)
    return done


class _Conversion:
    def __init__(
        self, source: Source, layout: Layout, options: ImportOptions, done: Imported
    ) -> None:
        self.source, self.layout, self.options, self.done = source, layout, options, done
        self.module: Mapping[str, Any] = source.model["module"]
        self.params = layout.parameters
        self.dtypes = [self._dtype(parameter) for parameter in self.params]
        sizes: Any = [
            (sum(piece.numel() for piece in p.master), CODES[dtype].lower(), p.group, 0)
            for p, dtype in zip(self.params, self.dtypes, strict=True)
        ]
        self.plan = _core.Plan(sizes, world=1, stage=0, cap_bytes=_BUCKET)

    def _dtype(self, parameter: Parameter) -> torch.dtype:
        value = self.module.get(parameter.name)
        dtype = value.dtype if isinstance(value, Tensor) else torch.float32
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise CheckpointError(f"{parameter.name} is of {dtype}, which no optimizer trains")
        return dtype

    def snapshot(self) -> Snapshot:
        snapshot, beside = Snapshot(), dict[str, Tensor]()
        frozen = dict(self._frozen())
        buffers = {n: self.module[n] for n in self.source.model["buffer_names"] or ()}
        self.done.parameters, self.done.frozen = len(self.params), len(frozen)
        self.done.buffers = len(buffers)
        snapshot.tensors.extend(self._buckets())
        snapshot.tensors.extend(Stored.of(f"param.{n}", value) for n, value in frozen.items())
        snapshot.tensors.extend(Stored.of(f"buffer.{n}", value) for n, value in buffers.items())
        snapshot.states.update(self._states())
        snapshot.shared.update(self._origin())
        snapshot.shared.update(self._layout(frozen))
        snapshot.shared.update(self._values(beside))
        snapshot.tensors.extend(Stored.of(name, tensor) for name, tensor in beside.items())
        return snapshot

    # Tensors.

    def _buckets(self) -> Iterator[Stored]:
        for bucket in self.plan.buckets:
            held = [
                (offset, self.params[param])
                for param, offset in zip(bucket.params, bucket.offsets, strict=True)
            ]
            wide = torch.float64 if bucket.dtype == "f64" else torch.float32
            name = f"bucket.{bucket.id}"
            yield _stored(f"{name}.master", wide, [(at, p.master) for at, p in held])
            for key in sorted({key for _, p in held for key in p.state}):
                parts = [(at, p.state[key]) for at, p in held if key in p.state]
                yield _stored(f"{name}.state.{key}", wide, parts)

    def _states(self) -> Iterator[tuple[int, ParamState]]:
        for index, parameter in enumerate(self.params):
            if parameter.state or parameter.values:
                values = {
                    key: encode(_step(value) if key == "step" else value, key, {})
                    for key, value in self._single(parameter).items()
                }
                yield index, ParamState(values=values, tensors=tuple(sorted(parameter.state)))

    def _single(self, parameter: Parameter) -> dict[str, Any]:
        """Single values; some of DeepSpeed's optimizers count the steps in the group."""
        group = self.layout.groups[parameter.group]
        if "step" in group and "step" not in parameter.values:
            return {**parameter.values, "step": group["step"]}
        return parameter.values

    def _aliases(self) -> dict[str, str]:
        """Further names of tied tensors: those that DeepSpeed lists, and that share memory."""
        found = dict(self.source.model.get("shared_params") or {})
        first: dict[Any, str] = {}
        trained = [parameter.name for parameter in self.params]
        for name in [*trained, *self.module]:
            value = self.module.get(name)
            if isinstance(value, Tensor) and value.numel():
                key = (value.data_ptr(), tuple(value.shape), value.stride())
                if first.setdefault(key, name) != name:
                    found.setdefault(name, first[key])
        return {name: kept for name, kept in found.items() if name not in trained}

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """What is neither trained, nor a buffer, nor a further name."""
        skipped = {p.name for p in self.params} | self._aliases().keys()
        skipped |= set(self.source.model["buffer_names"] or ())
        shapes = self.source.model.get("frozen_param_shapes") or {}
        untold = []
        for name, value in self.module.items():
            if name in skipped or not isinstance(value, Tensor):
                continue
            if self.layout.stage < 3:
                yield name, value
            elif name in shapes:
                parts = [model["frozen_param_fragments"][name] for model in self.source.models]
                numel = torch.Size(shapes[name]).numel()
                yield name, torch.cat(parts).narrow(0, 0, numel).view(tuple(shapes[name]))
            else:
                untold.append(name)
        if untold:
            self.done.notes.append(
                f"{', '.join(untold[:8])}: no values in the files, so another name of a tied "
                "weight, or frozen and left out"
            )

    # The manifest.

    def _origin(self) -> dict[str, Any]:
        model, now = self.source.model, time_ns()
        steps = int(model.get("global_steps") or 0)
        each = int((model.get("ds_config") or {}).get("gradient_accumulation_steps") or 1)
        return {
            "zerort": _core.__version__,
            "torch": str(torch.__version__),
            "saved": datetime.fromtimestamp(now / 1e9, timezone.utc).isoformat(timespec="seconds"),
            "saved_ns": now,
            "world": 1,
            "stage": self.layout.stage,
            "plan_digest": f"{self.plan.digest:016x}",
            "counters": {
                "global_steps": steps,
                "global_samples": int(model.get("global_samples") or 0),
                "micro_steps": steps * each,
                "skipped_steps": int(model.get("skipped_steps") or 0),
            },
        }

    def _layout(self, frozen: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "params": [
                {
                    "name": parameter.name,
                    "shape": parameter.shape,
                    "strides": strides_of(torch.empty(parameter.shape, device="meta")),
                    "dtype": CODES[dtype],
                    "group": parameter.group,
                    "frozen": False,
                    "stored": True,
                }
                for parameter, dtype in zip(self.params, self.dtypes, strict=True)
            ],
            "aliases": self._aliases(),
            "frozen": tuple(frozen),
            "buckets": tuple(
                {
                    "params": tuple(spec.params),
                    "offsets": tuple(spec.offsets),
                    "numel": spec.numel,
                    "shard_numel": spec.shard_numel,
                }
                for spec in self.plan.buckets
            ),
        }

    def _values(self, beside: dict[str, Tensor]) -> dict[str, Any]:
        name = self._optimizer()
        accepted = _options_of(name)
        groups = tuple(
            {
                key: encode(_tuple(value), f"param_groups[{at}][{key!r}]", beside)
                for key, value in group.items()
                if key != "params" and (accepted is None or key in accepted)
            }
            for at, group in enumerate(self.layout.groups)
        )
        if not any(groups):
            self.done.notes.append(
                "the options of the optimizer's groups are not in the files (elastic_checkpoint): "
                "those of the engine that loads stay"
            )
        extra = {
            key.removesuffix("_extra_state").rstrip("."): encode(value, key, beside)
            for key, value in self.module.items()
            if key.endswith("_extra_state")
        }
        return {
            "optimizer": {"name": name, "groups": groups},
            "scheduler": self._scheduler(beside),
            "loss_scale": self._loss_scale(),
            "client_state": encode_client_state(self._client_state(), beside, allow_pickle=False),
            "extra_state": extra,
        }

    def _client_state(self) -> dict[str, Any]:
        given = {key: v for key, v in self.source.model.items() if key not in _OWN}
        left = [key for key, value in given.items() if holds_records(value)]
        if left:
            self.done.notes.append(
                f"client_state: {', '.join(map(repr, left[:8]))} held objects and is left out"
            )
        return {key: value for key, value in given.items() if key not in left}

    def _optimizer(self) -> str:
        if self.options.optimizer is not None:
            return self.options.optimizer
        config = (self.source.model.get("ds_config") or {}).get("optimizer") or {}
        kind, given = str(config.get("type") or ""), config.get("params") or {}
        if kind.lower() in ("adam", "adamw", "fusedadam"):
            apart = kind.lower() == "adamw" or given.get("adam_w_mode", True)
            return "AdamW" if apart else "Adam"
        known = {"sgd": "SGD", "adagrad": "Adagrad", "lion": "Lion", "fusedlion": "Lion"}
        if kind:
            return known.get(kind.lower(), kind)
        apart = all(group.get("decoupled_weight_decay", True) for group in self.layout.groups)
        kept = {key for parameter in self.params for key in parameter.state}
        guess = "AdamW" if apart else "Adam"
        if kept and not {"exp_avg", "exp_avg_sq"} <= kept:
            raise CheckpointError(
                f"the optimizer was the caller's own and keeps {', '.join(sorted(kept))}: name its "
                "class with --optimizer"
            )
        self.done.notes.append(
            f"the optimizer was the caller's own, and {guess} is what its state looks like: "
            "--optimizer names another"
        )
        return guess

    def _scheduler(self, beside: dict[str, Tensor]) -> dict[str, Any] | None:
        model = self.source.model
        state = model.get("lr_scheduler")
        config = (model.get("ds_config") or {}).get("scheduler") or {}
        name = self.options.scheduler or config.get("type")
        if state is None:
            return None
        if name is None and isinstance(state, dict) and "lr_lambdas" in state:
            name = "LambdaLR"
        if name is None:
            self.done.notes.append(
                "the scheduler was the caller's own and is not taken: --scheduler names its class"
            )
            return None
        return {"name": str(name), "state": encode(state, "scheduler", beside)}

    def _loss_scale(self) -> tuple[float, int, int, int] | None:
        scaler = self.layout.loss_scaler
        if not isinstance(scaler, Record) or not getattr(scaler, "dynamic", False):
            return None
        kept = vars(scaler)
        return (
            float(kept["cur_scale"]),
            int(kept["cur_hysteresis"]),
            int(kept["cur_iter"]),
            int(kept["last_overflow_iter"]) + 1,  # counted from zero there
        )


def _stored(name: str, dtype: torch.dtype, parts: Sequence[tuple[int, Sequence[Tensor]]]) -> Stored:
    """Parts of a bucket, by where they begin in it."""
    pieces = [piece for _, held in parts for piece in held]
    runs: list[tuple[int, int]] = []
    for at, held in parts:
        length = sum(piece.numel() for piece in held)
        if runs and sum(runs[-1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        elif length:
            runs.append((at, length))
    total = sum(length for _, length in runs)
    return Stored(name, dtype, (total,), _Cast(pieces, dtype), tuple(runs))


class _Cast(Sequence[Tensor]):
    """Tensors in another dtype, each made when it is asked for."""

    def __init__(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._pieces, self._dtype = pieces, dtype

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: Any) -> Any:
        return self._pieces[index].to(self._dtype)


def _step(value: Any) -> Tensor:
    """A count of steps, as torch's optimizers keep it."""
    return torch.as_tensor(value, dtype=torch.float32).reshape(())


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _options_of(optimizer: str) -> set[str] | None:
    """The options of a class of torch's; None of another."""
    kind = getattr(torch.optim, optimizer, None)
    if kind is None:
        return None
    return {*inspect.signature(kind).parameters, "initial_lr", "decoupled_weight_decay"}
