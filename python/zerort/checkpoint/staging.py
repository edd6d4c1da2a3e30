"""What a load reads: everything that fits, verified, before anything of the engine changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zerort.checkpoint.client import SavedClientState
from zerort.checkpoint.encoding import decode
from zerort.checkpoint.fit import Fit
from zerort.checkpoint.manifest import Manifest, ParamState, rank_file
from zerort.checkpoint.match import LoadOptions, Match
from zerort.checkpoint.reading import Reader, Shard
from zerort.checkpoint.state import EngineState, extra_states, own_shard, strides_of
from zerort.checkpoint.tensors import DTYPES
from zerort.errors import CheckpointError
from zerort.optim.probe import is_known
from zerort.optim.segments import regions
from zerort.wire import WireState

__all__ = ["Staged", "stage"]


@dataclass
class Staged:
    """What this rank has read. Flat tensors are this rank's shards, on CPU."""

    masters: dict[int, Tensor] = field(default_factory=dict)
    """By bucket."""
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By bucket and key."""
    whole: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Tensors of other shapes, by the engine's parameter and key."""
    values: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Single values of the optimizer's state, by the engine's parameter and key."""
    loose: dict[str, Tensor] = field(default_factory=dict)
    """On rank 0 only, which broadcasts them."""
    options: list[dict[str, Any] | None] = field(default_factory=list)
    """Of each group of the optimizer; None where it keeps its own."""
    scheduler: Any = None
    loader: dict[str, Any] | None = None
    random: dict[str, Any] | None = None
    wire: WireState | None = None
    """What encoders of gradients had kept."""
    scale: float = 1.0
    """The loss scale at that time."""
    extra: dict[str, Any] = field(default_factory=dict)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    client_state: SavedClientState | None = None


def stage(
    reader: Reader, state: EngineState, match: Match, fit: Fit, options: LoadOptions
) -> Staged:
    """Reads and verifies. Raises `CheckpointError` and `OSError`; the engine is as it was."""
    staged, manifest = Staged(), reader.manifest
    shard = Shard(state.layout, state.comm.rank, match.origins, match.turned, match.from_whole)
    if options.weights:
        _stage_weights(reader, state, match, shard, staged)
    if options.optimizer:
        _stage_optimizer(reader, state, match, shard, staged)
    if options.scheduler and state.scheduler is not None and manifest.scheduler is not None:
        staged.scheduler = reader.value(manifest.scheduler.state)
    if not options.module_only:
        staged.features = {name: reader.value(kept) for name, kept in manifest.features.items()}
    staged.random = reader.value(fit.random, fit.writer)
    staged.loader = reader.value(fit.loader, fit.writer)
    staged.client_state = SavedClientState(
        manifest.client_state, lambda name: reader.whole(rank_file(0), name)
    )
    kept = reader.value(fit.wire, fit.writer)
    if kept is not None:
        staged.wire, staged.scale = _of_wire(kept, state)
    reader.fill()
    return staged


def _of_wire(kept: Any, state: EngineState) -> tuple[WireState, float]:
    """Its residuals are as long as those of the engine, or it has none."""
    try:
        found = WireState(str(kept["layout"]), int(kept["windows"]), dict(kept["residuals"]))
        scale = float(kept["scale"])
        lengths = {name: residual.shape for name, residual in found.residuals.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the manifest's state of the wire does not read: {error}") from error
    have = state.reduction.local.wire_state().residuals
    fits = all(name in have and have[name].shape == shape for name, shape in lengths.items())
    if not (fits and found.windows >= 0 and scale > 0):
        raise CheckpointError("the manifest's state of the wire is not one of these buckets")
    return found, scale


def _stage_weights(
    reader: Reader, state: EngineState, match: Match, shard: Shard, staged: Staged
) -> None:
    def strides(param: int) -> tuple[int, ...]:
        return strides_of(state.flat.params[param])

    for bucket in state.flat.kept:
        spec = bucket.spec
        own = own_shard(bucket, bucket.master, state.comm.rank)
        if all(match.origins[param] >= 0 for param in spec.params):
            into = torch.zeros(own.shape, dtype=own.dtype)
        else:
            into = own.detach().cpu().clone()
        shard.want(reader, spec, "master", into)
        shard.want_whole(reader, spec, strides, into)
        staged.masters[spec.id] = into
    if state.comm.rank == 0:
        for name, source in match.loose.items():
            if isinstance(source, int):
                staged.loose[name] = reader.planned(source)
            else:
                staged.loose[name] = reader.whole(rank_file(0), source)
    known = reader.manifest.extra_state
    staged.extra = {
        name: reader.value(known[name]) for name, _ in extra_states(state.module) if name in known
    }


def _stage_optimizer(
    reader: Reader, state: EngineState, match: Match, shard: Shard, staged: Staged
) -> None:
    # State of torch's own is of its tensors' dtype. Of another's only what was like the masters.
    follows = is_known(state.optimizer.optimizer)
    for bucket in state.flat.stepped:
        length = own_shard(bucket, bucket.master, state.comm.rank).numel()
        held = {
            param: kept for param in bucket.spec.params if (kept := match.states[param]) is not None
        }
        owned = {region.param for region in regions(bucket)}
        found = staged.states[bucket.spec.id] = {}
        for key in sorted({key for kept in held.values() for key in kept.tensors}):
            holders = {param for param, kept in held.items() if key in kept.tensors}
            origin = match.origins[min(holders)]
            dtype = _saved_in(reader.manifest, key, origin, follows=follows)
            into = torch.zeros(length, dtype=dtype or bucket.state_dtype)
            shard.want(reader, bucket.spec, f"state.{key}", into, holders)
            found[key] = into
        for param, kept in held.items():
            staged.values[param] = _decoded(kept)
            for key in kept.whole if param in owned else ():
                staged.whole[param, key] = reader.of_optimizer(match.origins[param], key)
    kept_by = reader.manifest.optimizer
    saved = kept_by.groups if kept_by is not None else ()
    staged.options = [
        None if source is None else reader.value(saved[source]) for source in match.groups
    ]


def _decoded(kept: ParamState) -> dict[str, Any]:
    return {key: decode(value, _no_tensor) for key, value in kept.values.items()}


def _no_tensor(name: str) -> Tensor:
    raise CheckpointError(f"a single value of the optimizer names tensor {name}")


def _saved_in(manifest: Manifest, key: str, origin: int, *, follows: bool) -> torch.dtype | None:
    """What a kind of state was saved in; None where that was what the optimizer computed in, which
    may be something else now. `follows` says so of all its floating-point state.
    """
    home = f"bucket.{manifest.home[origin]}"
    code = manifest.dtype_of[f"{home}.state.{key}"]
    saved = DTYPES[code]
    if code == manifest.dtype_of.get(f"{home}.master") or (follows and saved.is_floating_point):
        return None
    return saved
