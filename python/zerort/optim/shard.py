"""A torch optimizer over this rank's shards.

The optimizer's own parameter groups are kept, schedulers and user code may go on holding them; only
the tensors in them are exchanged, for `Segment`s of the flat buffers. A segment is a whole owned
part to begin with. Freezing a parameter cuts the segment around it, with its state, and a frozen
segment has no gradient, so torch's own rule applies: its values, its moments and its step count
stay as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerort.errors import StepError
from zerort.memory import FlatBucket, FlatModel, Form

__all__ = ["Region", "Segment", "ShardOptimizer", "has_stepped", "regions"]


@dataclass
class Segment:
    """A run of a bucket's owned part that the optimizer sees as one parameter; start and length in
    elements of it.
    """

    bucket: FlatBucket
    start: int
    length: int
    form: Form | None = None
    active: bool = True
    tensor: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.tensor = nn.Parameter(self.of(self.bucket.master), requires_grad=False)

    def of(self, flat: Tensor) -> Tensor:
        """This segment's part of a tensor that lies as the bucket's owned part does, in the
        segment's shape.
        """
        piece = flat.narrow(0, self.start, self.length)
        return piece if self.form is None else self.form.over(piece)

    def flattened(self, value: Tensor) -> Tensor:
        """The inverse of `of`: a tensor in the segment's shape as the (length,) elements of the
        owned part.
        """
        if self.form is None:
            return value
        flat = torch.empty(self.length, dtype=value.dtype, device=value.device)
        self.form.over(flat).copy_(value)
        return flat

    def load_gradient(self) -> None:
        """Shows the optimizer the reduced gradient, or none where the segment is frozen."""
        gradient = self.of(self.bucket.accum.tensor) if self.active else None
        # torch wants gradients in their parameter's dtype; sums in less than that are widened here.
        self.tensor.grad = None if gradient is None else gradient.to(self.tensor.dtype)

    def cut(self, runs: Sequence[tuple[int, int, bool]]) -> list[Segment]:
        """This segment's parts along `runs` (start, end, active) of the bucket's owned part."""
        parts = []
        for start, end, active in runs:
            lo, hi = max(start, self.start), min(end, self.start + self.length)
            if lo < hi:
                parts.append(Segment(self.bucket, lo, hi - lo, self.form, active))
        return parts


class ShardOptimizer:
    """Steps `optimizer` over segments instead of the module's parameters.

    `whole_tensors` gives it one shaped segment per parameter, for optimizers that look at whole
    tensors; that needs a replicated optimizer, where every rank owns every bucket.
    """

    def __init__(self, optimizer: Optimizer, flat: FlatModel, *, whole_tensors: bool) -> None:
        self.optimizer = optimizer
        self._buckets, self._whole_tensors = flat.buckets, whole_tensors
        self.segments = self._uncut()
        self._scales_itself = getattr(optimizer, "_step_supports_amp_scaling", False) and all(
            group.get("fused") for group in optimizer.param_groups
        )
        self._initial = _initial_state(optimizer)
        optimizer.state.clear()
        self._regroup()
        self._give_initial_state()

    def split(self) -> None:
        """Follows freezing and unfreezing: segments are cut where `requires_grad` changes, and
        never joined again.
        """
        self._cut(lambda _: None)

    def check(self) -> None:
        """Raises `StepError` when something else than the segments has been put into the
        optimizer's groups.
        """
        if [
            id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]
        ] != self._given:
            raise StepError(
                "the optimizer's parameter groups have changed since initialize, for example by "
                "add_param_group: their parameters are flat shards now. Make all groups before "
                "zerort.initialize, and train a part of them by requires_grad_"
            )

    def restart(self, label: Callable[[int], Hashable]) -> None:
        """Goes back to the initial state without cuts, then cuts where `requires_grad` or an id's
        `label` changes.

        The parameters of a segment have one label then, so that one state can be given to them all.
        """
        self.optimizer.state.clear()
        self.segments = self._uncut()
        self._give_initial_state()
        self._cut(label)

    def _give_initial_state(self) -> None:
        for segment in self.segments:
            initial = self._initial.get(segment.bucket.spec.group)
            if initial is not None:
                self.optimizer.state[segment.tensor] = {
                    key: torch.full_like(segment.tensor, value)
                    if isinstance(value, float)
                    else value.clone()
                    for key, value in initial.items()
                }

    def _uncut(self) -> list[Segment]:
        return [
            segment
            for bucket in self._buckets
            for segment in (
                _shaped(bucket)
                if self._whole_tensors
                else [Segment(bucket, 0, bucket.master.numel())]
            )
        ]

    def _cut(self, label: Callable[[int], Hashable]) -> None:
        runs = {id(bucket): list(_runs(bucket, label)) for bucket in self._buckets}
        segments: list[Segment] = []
        for segment in self.segments:
            parts = segment.cut(runs[id(segment.bucket)])
            if len(parts) == 1:
                segment.active = parts[0].active
                segments.append(segment)
            else:
                self._cut_state(segment, parts)
                segments += parts
        self.segments = segments
        self._regroup()

    def step(self, factor: float) -> None:
        """One update with the reduced gradients times `factor`."""
        for segment in self.segments:
            segment.load_gradient()
        try:
            self._step(factor)
        finally:
            # A loop that still calls the optimizer's own step() must not apply this gradient once
            # more.
            for segment in self.segments:
                segment.tensor.grad = None

    def _step(self, factor: float) -> None:
        gradients = [
            segment.tensor.grad for segment in self.segments if segment.tensor.grad is not None
        ]
        if factor == 1.0 or not gradients:
            # A rank that owns frozen parameters only steps too: hooks, counters and schedulers go
            # the same way on every rank.
            self.optimizer.step()
        elif self._scales_itself:
            self._step_scaled(1.0 / factor, gradients[0].device)
        else:
            torch._foreach_mul_(gradients, factor)
            self.optimizer.step()

    def _step_scaled(self, divisor: float, device: torch.device) -> None:
        # Fused kernels divide on the way, which saves a pass over the gradients; GradScaler uses
        # the same attributes.
        scaled: Any = self.optimizer
        scaled.grad_scale = torch.full((), divisor, dtype=torch.float32, device=device)
        scaled.found_inf = None
        try:
            self.optimizer.step()
        finally:
            del scaled.grad_scale, scaled.found_inf

    def _regroup(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [
                segment.tensor for segment in self.segments if segment.bucket.spec.group == index
            ]
        self._given = [
            id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]
        ]

    def _cut_state(self, segment: Segment, parts: Sequence[Segment]) -> None:
        state = self.optimizer.state.pop(segment.tensor, {})
        for part in parts if state else ():
            at = part.start - segment.start
            self.optimizer.state[part.tensor] = {
                key: value.narrow(0, at, part.length)
                if isinstance(value, Tensor) and value.shape == segment.tensor.shape
                else copy.deepcopy(value)
                for key, value in state.items()
            }


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the optimizer's state holds more than its constructor put there (Adagrad's does, most
    leave it empty).
    """
    return any(
        bool((value != value.reshape(-1)[0]).any())
        if value.shape == parameter.shape
        else bool(value.any())
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel()
    )


def _initial_state(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """By group, what the constructor gave its first parameter: a number for what has its shape,
    else a tensor.
    """
    initial = {}
    for index, group in enumerate(optimizer.param_groups):
        parameter = next((p for p in group["params"] if p.numel() and optimizer.state.get(p)), None)
        if parameter is not None:
            initial[index] = {
                key: float(value.reshape(-1)[0]) if value.shape == parameter.shape else value
                for key, value in optimizer.state[parameter].items()
            }
    return initial


@dataclass(frozen=True)
class Region:
    """A parameter's elements of a bucket's owned part, with the padding behind them; start and end
    count from there.
    """

    start: int
    end: int
    param: int
    """Id of the parameter."""
    parameter: nn.Parameter


def regions(bucket: FlatBucket) -> Iterator[Region]:
    """What tiles the bucket's owned part. Empty parameters have no region."""
    end_of_owned = bucket.start + bucket.master.numel()
    ends = [*bucket.spec.offsets[1:], bucket.spec.numel]
    members = zip(bucket.spec.offsets, ends, bucket.spec.params, bucket.params, strict=True)
    for start, end, param, parameter in members:
        lo, hi = max(start, bucket.start), min(end, end_of_owned)
        if lo < hi:
            yield Region(lo - bucket.start, hi - bucket.start, param, parameter)


def _runs(bucket: FlatBucket, label: Callable[[int], Hashable]) -> Iterator[tuple[int, int, bool]]:
    def key(region: Region) -> tuple[bool, Hashable]:
        return region.parameter.requires_grad, label(region.param)

    for (active, _), group in groupby(regions(bucket), key=key):
        members = list(group)
        yield members[0].start, members[-1].end, active


def _shaped(bucket: FlatBucket) -> list[Segment]:
    pieces = zip(bucket.spec.offsets, bucket.spec.numels, bucket.forms, strict=True)
    return [Segment(bucket, start, length, form) for start, length, form in pieces]
