"""Collects an engine's state for a save: the tensors of this rank's file, and what goes into the
manifest.

The tensors are views of the engine's own memory, so a snapshot costs no memory and holds good until
the next step; everything else in it is the snapshot's own. What is the same on all ranks is
collected by rank 0 alone; what the optimizer keeps of a parameter comes from every rank that owns a
part of it, and must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from time import time_ns
from typing import Any

import torch
from torch import Tensor

from zerort import _core
from zerort.checkpoint.client import encode_client_state
from zerort.checkpoint.encoding import Json, encode
from zerort.checkpoint.manifest import ParamState
from zerort.checkpoint.state import (
    EngineState,
    aliases,
    by_bucket,
    extra_states,
    loose,
    scheduler_name,
    strides_of,
)
from zerort.checkpoint.tensors import CODES, Stored
from zerort.device.random import random_states
from zerort.errors import CheckpointError
from zerort.memory import Kept
from zerort.optim.segments import Region, Segment, regions

__all__ = ["KeepOptions", "Snapshot", "collect", "merged_states", "planned"]

Spans = list[tuple[int, int]]
"""Half-open ranges of a bucket's owned part, ascending and apart."""


@dataclass(frozen=True)
class Snapshot:
    """What this rank contributes to a checkpoint."""

    tensors: list[Stored] = field(default_factory=list)
    states: dict[int, ParamState] = field(default_factory=dict)
    """What the optimizer keeps of the parameters in this rank's shards, by id."""
    own: dict[str, Json] = field(default_factory=dict)
    """State of this rank's own."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Fields of the manifest; empty but on rank 0."""


@dataclass(frozen=True)
class KeepOptions:
    """What a call of `save_checkpoint` wants in it."""

    exclude_frozen: bool = False
    allow_pickle: bool = False
    """Whether objects in `client_state` may be pickled."""


def collect(state: EngineState, client_state: dict[str, Any], options: KeepOptions) -> Snapshot:
    """This rank's snapshot, behind `EngineState.take_writes`. Raises `CheckpointError` for a value
    that a checkpoint cannot hold, with its path.
    """
    exclude_frozen = options.exclude_frozen
    snapshot, beside = planned(state, exclude_frozen=exclude_frozen), dict[str, Tensor]()
    snapshot.own.update(_own(state, beside))
    if state.comm.rank == 0:
        snapshot.shared.update(_shared(state, client_state, beside, options))
        left_out = (
            {f"param.{name}" for name in snapshot.shared["frozen"]} if exclude_frozen else set()
        )
        kept = (
            (name, tensor)
            for name, tensor in loose(state.module, state.flat)
            if name not in left_out
        )
        snapshot.tensors.extend(Stored.of(name, tensor) for name, tensor in kept)
    snapshot.tensors.extend(Stored.of(name, tensor) for name, tensor in beside.items())
    return snapshot


def planned(state: EngineState, *, exclude_frozen: bool = False) -> Snapshot:
    """What lies in buckets, and nothing else: masters and the optimizer's state."""
    snapshot, segments = Snapshot(), by_bucket(state.optimizer)
    for bucket in state.flat.kept:
        of_bucket = segments.get(id(bucket), [])
        _collect_bucket(state, bucket, of_bucket, snapshot, exclude_frozen=exclude_frozen)
    return snapshot


def merged_states(
    all_states: Iterable[dict[int, ParamState]], names: list[str]
) -> dict[int, ParamState]:
    """What the optimizer keeps of each parameter. Raises `CheckpointError` naming one about which
    ranks disagree.
    """
    merged: dict[int, ParamState] = {}
    for states in all_states:
        for param, found in states.items():
            if merged.setdefault(param, found) != found:
                raise CheckpointError(
                    f"ranks disagree about the optimizer's state of {names[param]}: its step "
                    "counts?"
                )
    return merged


def _collect_bucket(
    state: EngineState,
    bucket: Kept,
    segments: Iterable[Segment],
    snapshot: Snapshot,
    *,
    exclude_frozen: bool,
) -> None:
    spec = bucket.spec
    lo = state.comm.rank * spec.shard_numel - bucket.start
    window = (lo, lo + spec.shard_numel)
    kept = [r for r in regions(bucket) if not exclude_frozen or r.parameter.requires_grad]
    spans = _joined((region.start, region.end) for region in kept)
    name = f"bucket.{spec.id}"
    snapshot.tensors.extend(_part(f"{name}.master", [(0, bucket.master)], spans, window))
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for segment, inside in _with_regions(segments, kept):
        held = state.optimizer.optimizer.state.get(segment.tensor)
        if not held:
            continue
        elementwise, whole, values = _sorted(held, segment)
        for key in elementwise:
            pieces.setdefault(key, []).append((segment.start, segment.flattened(held[key])))
        found = ParamState(values=values, tensors=tuple(elementwise), whole=tuple(whole))
        for region in inside:
            if region.start < window[1] and region.end > window[0]:
                snapshot.states[region.param] = found
            if state.comm.rank == 0 or state.plan.shards_optimizer:
                snapshot.tensors.extend(
                    Stored.of(f"optimizer.{region.param}.{key}", held[key]) for key in whole
                )
    for key, parts in pieces.items():
        snapshot.tensors.extend(_part(f"{name}.state.{key}", parts, spans, window))


def _with_regions(
    segments: Iterable[Segment], kept: Sequence[Region]
) -> Iterator[tuple[Segment, list[Region]]]:
    """Each segment with the regions of `kept` in it. Both ascend, and no region is in two."""
    at = 0
    for segment in segments:
        end = segment.start + segment.length
        while at < len(kept) and kept[at].end <= segment.start:
            at += 1
        first = at
        while at < len(kept) and kept[at].start < end:
            at += 1
        yield segment, list(kept[first:at])


def _sorted(held: dict[str, Any], segment: Segment) -> tuple[list[str], list[str], dict[str, Json]]:
    """Keys of what has a value for each element, keys of tensors of other shapes, and the single
    values, encoded.
    """
    elementwise: list[str] = []
    whole: list[str] = []
    values: dict[str, Json] = {}
    for key, value in held.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            values[key] = encode(value, f"the optimizer's state {key!r}", {})
        elif value.shape == segment.tensor.shape:
            elementwise.append(key)
        elif segment.form is not None:
            whole.append(key)
        else:
            shape = list(value.shape)
            raise CheckpointError(
                f"the optimizer's state {key!r} of shape {shape} belongs to no element of a shard"
            )
    return elementwise, whole, values


def _joined(spans: Iterable[tuple[int, int]]) -> Spans:
    joined: Spans = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _part(
    name: str, pieces: list[tuple[int, Tensor]], spans: Spans, window: tuple[int, int]
) -> list[Stored]:
    """This rank's part of flat tensors: what of `pieces` (start, elements) lies in both `spans` and
    `window`.
    """
    found: list[Tensor] = []
    runs: Spans = []
    first = 0  # both ascend: what ends before this piece begins concerns none behind it either
    for at, piece in pieces:
        while first < len(spans) and spans[first][1] <= at:
            first += 1
        for start, end in islice(spans, first, None):
            if start >= at + piece.numel():
                break
            lo, hi = max(start, at, window[0]), min(end, at + piece.numel(), window[1])
            if lo < hi:
                found.append(piece.narrow(0, lo - at, hi - lo))
                runs.append((lo - window[0], hi - window[0]))
    if not found:
        return []
    lengths = tuple((start, end - start) for start, end in _joined(runs))
    return [Stored(name, found[0].dtype, (sum(piece.numel() for piece in found),), found, lengths)]


def _own(state: EngineState, beside: dict[str, Tensor]) -> dict[str, Json]:
    own = {"rng": encode(random_states(state.comm.device), "rng", beside)}
    if hasattr(state.loader, "state_dict"):
        own["loader"] = encode(state.loader.state_dict(), "loader", beside)
    wire = state.reduction.local.wire_state()
    residuals = dict(wire.residuals) if state.keeps_feedback else {}
    if wire.windows or residuals:
        kept = {
            "layout": wire.layout,
            "windows": wire.windows,
            "scale": state.loss_scale.scale,
            "residuals": residuals,
        }
        own["wire"] = encode(kept, "wire", beside)
    return own


def _shared(
    state: EngineState,
    client_state: dict[str, Any],
    beside: dict[str, Tensor],
    options: KeepOptions,
) -> dict[str, Any]:
    return {
        **_origin(state),
        **_layout(state, exclude_frozen=options.exclude_frozen),
        **_values(state, beside),
        "client_state": encode_client_state(
            client_state, beside, allow_pickle=options.allow_pickle
        ),
    }


def _origin(state: EngineState) -> dict[str, Any]:
    """What wrote it, when, on what."""
    now = time_ns()
    return {
        "zerort": _core.__version__,
        "torch": str(torch.__version__),
        "saved": datetime.fromtimestamp(now / 1e9, timezone.utc).isoformat(timespec="seconds"),
        "saved_ns": now,
        "world": state.comm.world,
        "stage": state.stage,
        "plan_digest": f"{state.plan.digest:016x}",
        "counters": vars(state.counters).copy(),
    }


def _layout(state: EngineState, *, exclude_frozen: bool) -> dict[str, Any]:
    """Which tensors there are, and where they lie."""
    return {
        "params": _params(state, exclude_frozen=exclude_frozen),
        "aliases": aliases(state.module),
        "frozen": tuple(
            name.removeprefix("param.")
            for name, tensor in loose(state.module, state.flat)
            if name.startswith("param.") and not tensor.requires_grad
        ),
        "buckets": tuple(
            {
                "params": tuple(spec.params),
                "offsets": tuple(spec.offsets),
                "numel": spec.numel,
                "shard_numel": spec.shard_numel,
            }
            for spec in state.layout.buckets
        ),
    }


def _values(state: EngineState, beside: dict[str, Tensor]) -> dict[str, Any]:
    """What is no tensor of a parameter's, encoded."""
    scale = state.loss_scale
    return {
        "optimizer": _optimizer(state, beside),
        "scheduler": _scheduler(state, beside),
        "loss_scale": scale.state() if isinstance(scale, _core.LossScale) else None,
        "features": {
            name: encode(kept, f"features.{name}", beside)
            for name, kept in state.events.state().items()
        },
        "extra_state": {
            name: encode(module.get_extra_state(), f"extra_state.{name}", beside)
            for name, module in extra_states(state.module)
        },
    }


def _optimizer(state: EngineState, beside: dict[str, Tensor]) -> dict[str, Any] | None:
    if state.optimizer.name is None:
        return None
    groups = enumerate(state.optimizer.groups)
    options = tuple(_options(group, index, beside) for index, group in groups)
    kinds = tuple(state.optimizer.kinds)
    several = {"kinds": kinds} if len(set(kinds)) > 1 else {}
    return {"name": state.optimizer.name, "groups": options, **several}


def _scheduler(state: EngineState, beside: dict[str, Tensor]) -> dict[str, Json] | None:
    if state.scheduler is None:
        return None
    kept = encode(state.scheduler.state_dict(), "scheduler", beside)
    return {"name": scheduler_name(state.scheduler), "state": kept}


def _options(group: dict[str, Any], index: int, beside: dict[str, Tensor]) -> dict[str, Json]:
    where = f"param_groups[{index}]"
    return {
        key: encode(value, f"{where}[{key!r}]", beside)
        for key, value in group.items()
        if key != "params"
    }


def _params(state: EngineState, *, exclude_frozen: bool) -> list[dict[str, Any]]:
    groups = {param: spec.group for spec in state.plan.buckets for param in spec.params}
    return [
        {
            "name": name,
            "shape": tuple(parameter.shape),
            "strides": strides_of(parameter),
            "dtype": CODES[parameter.dtype],
            "group": groups[param],
            "frozen": not parameter.requires_grad,
            "stored": parameter.requires_grad or not exclude_frozen,
        }
        for param, (name, parameter) in enumerate(
            zip(state.flat.names, state.flat.params, strict=True)
        )
    ]
