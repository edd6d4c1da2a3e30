"""Writes what a load has read into the engine's memory, on all ranks together.

It has collectives in it where ranks hold what only one has read: the optimizer where it is
replicated, buffers, and the parameters that follow from the masters. Nothing here calls an object
of the user's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zerort.checkpoint.manifest import ParamState
from zerort.checkpoint.match import LoadOptions, Match
from zerort.checkpoint.staging import Staged
from zerort.checkpoint.state import EngineState, by_bucket, loose, own_shard
from zerort.memory import Kept
from zerort.optim.segments import Segment, regions

__all__ = ["apply"]


def apply(state: EngineState, match: Match, staged: Staged, options: LoadOptions) -> None:
    """Masters, optimizer state, buffers and unplanned parameters; then the parameters follow."""
    with torch.no_grad():
        if options.weights:
            _apply_masters(state, staged)
            _apply_loose(state, staged)
        if options.optimizer:
            _apply_optimizer(state, match, staged)
    state.reduction.publish()


def _apply_masters(state: EngineState, staged: Staged) -> None:
    for bucket in state.flat.kept:
        bucket.ready()
        bucket.master.copy_(_owned(state, bucket, staged.masters[bucket.spec.id]))
        bucket.write_back()
    state.exchange.values()


def _apply_loose(state: EngineState, staged: Staged) -> None:
    names = state.comm.control.gather_objects(list(staged.loose))[0]
    tensors = dict(loose(state.module, state.flat))
    for name in names:
        data = tensors[name].detach()
        sent = torch.empty(data.shape, dtype=data.dtype, device=data.device)
        if name in staged.loose:
            sent.copy_(staged.loose[name])
        if sent.numel():
            # As bytes: not every dtype is one that a collective takes.
            state.comm.broadcast(sent.view(-1).view(torch.uint8))
        _write(data, sent)


def _write(data: Tensor, values: Tensor) -> None:
    """Each element of memory once: an expanded tensor refuses to be written to."""
    for dim, stride in enumerate(data.stride()):
        if stride == 0 and data.shape[dim] > 1:
            data, values = data.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    data.copy_(values)


def _owned(state: EngineState, bucket: Kept, shard: Tensor) -> Tensor:
    """The bucket's owned part (owned numel,) on the engine's device, from every rank's shard."""
    device, numel = bucket.master.device, bucket.master.numel()
    if numel == shard.numel():
        return shard.to(device)
    whole = torch.empty(numel, dtype=shard.dtype, device=device)
    own_shard(bucket, whole, state.comm.rank).copy_(shard)
    state.comm.all_gather(whole.view(torch.uint8)).start().wait()
    return whole


def _apply_optimizer(state: EngineState, match: Match, staged: Staged) -> None:
    labels = [None if kept is None else kept.model_dump_json() for kept in match.states]
    state.optimizer.restart(lambda param: labels[param])
    segments = by_bucket(state.optimizer)
    for bucket in state.flat.stepped:
        found = staged.states[bucket.spec.id]
        owned = {key: _owned(state, bucket, shard) for key, shard in found.items()}
        tiles = list(regions(bucket))
        starts = [region.start for region in tiles]
        for segment in segments.get(id(bucket), ()):
            if segment.length and starts:
                # Labels cut segments, so that one parameter speaks for all of a segment's.
                param = tiles[max(0, bisect_right(starts, segment.start) - 1)].param
                _give(state, segment, param, match.states, owned, staged)


def _give(
    state: EngineState,
    segment: Segment,
    param: int,
    states: Sequence[ParamState | None],
    owned: dict[str, Tensor],
    staged: Staged,
) -> None:
    kept = states[param]
    if kept is None:
        return
    optimizer = state.optimizer.optimizer
    group = optimizer.param_groups[segment.bucket.group]
    values = {
        key: _at_home(key, value, segment.tensor, group)
        for key, value in staged.values[param].items()
    }
    whole = {key: staged.whole[param, key].to(segment.tensor.device) for key in kept.whole}
    elementwise = {key: segment.of(owned[key]) for key in kept.tensors}
    optimizer.state[segment.tensor] = {**values, **elementwise, **whole}


def _at_home(key: str, value: Any, parameter: nn.Parameter, group: dict[str, Any]) -> Any:
    """A single value where torch's optimizers want it: a step count on CPU unless its kernel counts
    on the device. Each segment has its own.
    """
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value.clone()
    return value.to(parameter.device, copy=True)
