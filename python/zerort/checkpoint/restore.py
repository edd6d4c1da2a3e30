"""From a checkpoint that fits into an engine, in two halves: `stage` reads and changes nothing,
`apply` changes all.

Between the two stands the vote of all ranks. `apply` has collectives in it where ranks hold what
only one has read: the optimizer where it is replicated, buffers, and the parameters that follow
from the masters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zerort import _core
from zerort.checkpoint.encoding import decode
from zerort.checkpoint.manifest import Manifest, ParamState, rank_file
from zerort.checkpoint.match import Choice, Match
from zerort.checkpoint.reading import Reader, Shard
from zerort.checkpoint.rng import restore_random_states
from zerort.checkpoint.state import EngineState, extra_states, loose
from zerort.checkpoint.tensors import DTYPES
from zerort.errors import CheckpointError
from zerort.memory import FlatBucket
from zerort.optim.shard import Segment, regions

__all__ = ["Staged", "apply", "stage"]

_IMPLEMENTATION = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""Options that say how an optimizer computes, not what: the engine's stay."""


@dataclass
class Staged:
    """What this rank has read. Flat tensors are this rank's shards, on CPU."""

    masters: dict[int, Tensor] = field(default_factory=dict)
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """By bucket and key."""
    whole: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Tensors of other shapes, by the engine's parameter and key."""
    loose: dict[str, Tensor] = field(default_factory=dict)
    """On rank 0 only, which broadcasts them."""
    options: list[dict[str, Any] | None] = field(default_factory=list)
    scheduler: Any = None
    own: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    client_state: Any = None


def stage(reader: Reader, state: EngineState, match: Match, choice: Choice) -> Staged:
    """Reads and verifies. Raises `CheckpointError` and `OSError`; the engine is as it was."""
    staged, manifest = Staged(), reader.manifest
    shard = Shard(state.plan, state.comm.rank, match.turned)
    if choice.weights:
        _stage_weights(reader, state, match, shard, staged)
    if not choice.module_only:
        if choice.optimizer_states:
            _stage_optimizer(reader, state, match, shard, staged)
        if (
            choice.scheduler_states
            and state.scheduler is not None
            and manifest.scheduler is not None
        ):
            staged.scheduler = reader.value(manifest.scheduler)
        if manifest.world == state.comm.world:
            staged.own = reader.value(manifest.ranks[state.comm.rank], state.comm.rank)
    staged.client_state = reader.value(manifest.client_state)
    reader.fill()
    return staged


def _stage_weights(
    reader: Reader, state: EngineState, match: Match, shard: Shard, staged: Staged
) -> None:
    for bucket in state.flat.buckets:
        spec = bucket.spec
        if all(match.origins[param] >= 0 for param in spec.params):
            into = torch.zeros(spec.shard_numel, dtype=bucket.master.dtype)
        else:
            into = _own_shard(bucket, bucket.master, state.comm.rank).detach().cpu().clone()
        shard.want(reader, spec.id, "master", match.origins, into)
        staged.masters[spec.id] = into
    if state.comm.rank == 0:
        staged.loose = {name: reader.whole(rank_file(0), name) for name in match.loose}
    known = reader.manifest.extra_state
    staged.extra = {
        name: reader.value(known[name]) for name, _ in extra_states(state.module) if name in known
    }


def _stage_optimizer(
    reader: Reader, state: EngineState, match: Match, shard: Shard, staged: Staged
) -> None:
    manifest = reader.manifest
    for bucket in state.flat.buckets:
        spec = bucket.spec
        held = [(param, kept) for param in spec.params if (kept := match.states[param]) is not None]
        for key in sorted({key for _, kept in held for key in kept.tensors}):
            holders = {param for param, kept in held if key in kept.tensors}
            origins = [
                origin if param in holders else -1 for param, origin in enumerate(match.origins)
            ]
            dtype = _dtype_of(
                manifest, key, [match.origins[param] for param in holders], bucket.master.dtype
            )
            into = torch.zeros(spec.shard_numel, dtype=dtype)
            shard.want(reader, spec.id, f"state.{key}", origins, into)
            staged.states[spec.id, key] = into
        for param, kept in held:
            for key in kept.whole:
                name = f"optimizer.{match.origins[param]}.{key}"
                staged.whole[param, key] = reader.whole(rank_file(0), name)
    saved = manifest.optimizer.groups
    staged.options = [
        None if source is None else reader.value(saved[source]) for source in match.groups
    ]


def _dtype_of(
    manifest: Manifest, key: str, sources: Sequence[int], master: torch.dtype
) -> torch.dtype:
    """What a kind of state is kept in: the masters' dtype if it was saved in that, else what it was
    saved in.
    """
    home = {
        param: index for index, bucket in enumerate(manifest.buckets) for param in bucket.params
    }
    dtypes = manifest.dtype_of
    name = f"bucket.{home[min(sources)]}"
    saved = dtypes[f"{name}.state.{key}"]
    return master if saved == dtypes.get(f"{name}.master") else DTYPES[saved]


def apply(
    state: EngineState, manifest: Manifest, match: Match, staged: Staged, choice: Choice
) -> None:
    """Writes what was staged into the engine, on all ranks together."""
    with torch.no_grad():
        if choice.weights:
            _apply_weights(state, staged)
        if not choice.module_only:
            if choice.optimizer_states:
                _apply_optimizer(state, match, staged)
            _apply_small(state, manifest, staged)
    state.reduction.publish()


def _apply_weights(state: EngineState, staged: Staged) -> None:
    for bucket in state.flat.buckets:
        bucket.master.copy_(_owned(state, bucket, staged.masters[bucket.spec.id]))
        bucket.write_back()
    names = state.comm.gather_objects(list(staged.loose))[0]
    tensors = dict(loose(state.module, state.flat))
    for name in names:
        data = tensors[name].detach()
        landing = torch.empty(data.shape, dtype=data.dtype, device=data.device)
        if name in staged.loose:
            landing.copy_(staged.loose[name])
        if landing.numel():
            state.comm.broadcast(landing.view(-1).view(torch.uint8))
        data.copy_(landing)
    for name, module in extra_states(state.module):
        if name in staged.extra:
            module.set_extra_state(staged.extra[name])


def _own_shard(bucket: FlatBucket, owned: Tensor, rank: int) -> Tensor:
    """This rank's shard of a tensor that lies as the bucket's owned part does."""
    return owned.narrow(0, rank * bucket.spec.shard_numel - bucket.start, bucket.spec.shard_numel)


def _owned(state: EngineState, bucket: FlatBucket, shard: Tensor) -> Tensor:
    """The bucket's owned part (owned numel,) on the engine's device, from every rank's shard."""
    device, numel = bucket.master.device, bucket.master.numel()
    if numel == shard.numel():
        return shard.to(device)
    whole = torch.empty(numel, dtype=shard.dtype, device=device)
    _own_shard(bucket, whole, state.comm.rank).copy_(shard)
    state.comm.all_gather(whole.view(torch.uint8)).start().wait()
    return whole


def _apply_optimizer(state: EngineState, match: Match, staged: Staged) -> None:
    labels = [None if kept is None else kept.model_dump_json() for kept in match.states]
    state.optimizer.restart(lambda param: labels[param])
    optimizer = state.optimizer.optimizer
    for group, options in zip(optimizer.param_groups, staged.options, strict=True):
        taken = {key: value for key, value in (options or {}).items() if key not in _IMPLEMENTATION}
        group.update(taken)
    for bucket in state.flat.buckets:
        keys = [key for index, key in staged.states if index == bucket.spec.id]
        owned = {key: _owned(state, bucket, staged.states[bucket.spec.id, key]) for key in keys}
        for segment in state.optimizer.segments:
            if segment.bucket is bucket:
                _give(optimizer, segment, match.states, owned, staged)


def _give(
    optimizer: torch.optim.Optimizer,
    segment: Segment,
    states: Sequence[ParamState | None],
    owned: dict[str, Tensor],
    staged: Staged,
) -> None:
    param = next(r.param for r in regions(segment.bucket) if r.end > segment.start)
    kept = states[param]
    if kept is None:
        return
    group = optimizer.param_groups[segment.bucket.spec.group]
    values = {
        key: _at_home(key, decode(value, _no_tensor), segment.tensor, group)
        for key, value in kept.values.items()
    }
    whole = {key: staged.whole[param, key].to(segment.tensor.device) for key in kept.whole}
    optimizer.state[segment.tensor] = {
        **values,
        **{key: segment.of(owned[key]) for key in kept.tensors},
        **whole,
    }


def _no_tensor(name: str) -> Tensor:
    raise CheckpointError(f"a single value of the optimizer names tensor {name}")


def _at_home(key: str, value: Any, parameter: nn.Parameter, group: dict[str, Any]) -> Any:
    """A single value where torch's optimizers want it: a step count on CPU unless its kernel counts
    on the device.
    """
    if not isinstance(value, Tensor) or (
        key == "step" and not (group.get("capturable") or group.get("fused"))
    ):
        return value
    return value.to(parameter.device)


def _apply_small(state: EngineState, manifest: Manifest, staged: Staged) -> None:
    if staged.scheduler is not None:
        state.scheduler.load_state_dict(staged.scheduler)
    scale = manifest.loss_scale
    if scale is not None and isinstance(state.loss_scale, _core.LossScale):
        state.loss_scale.restore(scale)
    vars(state.counters).update(manifest.counters.model_dump())
    if "loader" in staged.own and hasattr(state.loader, "load_state_dict"):
        state.loader.load_state_dict(staged.own["loader"])
    if "rng" in staged.own:
        restore_random_states(staged.own["rng"], state.comm.device)
