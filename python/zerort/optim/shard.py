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
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from zerort.errors import StepError
from zerort.memory import FlatBucket, FlatModel
from zerort.optim.initial import InitialState
from zerort.optim.probe import Abilities, is_known
from zerort.optim.segments import Segment, flat_segments, runs, shaped_segments

__all__ = ["ShardOptimizer"]


class ShardOptimizer:
    """Steps `optimizer` over segments instead of the module's parameters.

    One that cannot run on shards gets a shaped segment for each parameter; that needs a replicated
    optimizer, where every rank owns every bucket. One that cannot step over gaps is shown only
    groups and tensors that have a gradient.
    """

    def __init__(self, optimizer: Optimizer, flat: FlatModel, abilities: Abilities) -> None:
        self.optimizer = optimizer
        self._buckets, self._gaps = flat.trained, abilities.gaps
        self._whole_tensors = abilities.shards is not None
        # Said by torch of its own classes; a subclass may do without.
        self._scales_itself = (
            is_known(optimizer)
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            and all(group.get("fused") for group in optimizer.param_groups)
        )
        self._initial = InitialState(optimizer, flat.params)
        self.restart(lambda _: None)

    @property
    def name(self) -> str | None:
        """Of the optimizer's class."""
        return type(self.optimizer).__qualname__

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimizer's own."""
        return self.optimizer.param_groups

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
        self._initial.begin(self.optimizer)
        self.segments = self._uncut()
        self._cut(lambda param: (self._initial.label(param), label(param)))
        for segment in self.segments:
            state = self._initial.of(segment.param, segment.tensor, segment.bucket.state_dtype)
            if state:
                self.optimizer.state[segment.tensor] = state

    def _uncut(self) -> list[Segment]:
        uncut = shaped_segments if self._whole_tensors else flat_segments
        return [segment for bucket in self._buckets for segment in uncut(bucket)]

    def _cut(self, label: Callable[[int], Hashable]) -> None:
        along = {id(bucket): runs(bucket, label) for bucket in self._buckets}
        segments: list[Segment] = []
        for segment in self.segments:
            parts = segment.cut(along[id(segment.bucket)])
            if len(parts) == 1:
                segment.active = parts[0].active
                segments.append(segment)
            else:
                self._cut_state(segment, parts)
                segments += parts
        self.segments = segments
        self._regroup()

    def batches(self) -> list[list[FlatBucket]]:
        """Buckets that are updated together, in the order of the plan. One on the host is updated
        alone, so that its parameters travel while the next is updated, and one that is widened for
        it, so that no more is wide at once: where that is torch's own optimizer, and nobody listens
        to its step.
        """
        if not any(map(_goes_alone, self._buckets)) or not self._steps_in_parts():
            return [self._buckets]
        found: list[list[FlatBucket]] = []
        for alone, run in groupby(self._buckets, key=_goes_alone):
            together = list(run)
            found += [[bucket] for bucket in together] if alone else [together]
        return found

    def _steps_in_parts(self) -> bool:
        optimizer = self.optimizer
        own = vars(optimizer).get("step")
        listened = [
            getattr(optimizer, "_optimizer_step_pre_hooks", None),
            getattr(optimizer, "_optimizer_step_post_hooks", None),
            _global_optimizer_pre_hooks,
            _global_optimizer_post_hooks,
        ]
        counted = own is None or hasattr(own, "_wrapped_by_lr_sched")
        return is_known(optimizer) and counted and not any(listened)

    def step(self, factor: float, batch: Sequence[FlatBucket]) -> None:
        """One update of these buckets, with the reduced gradients times `factor`."""
        chosen = set(map(id, batch))
        segments = [segment for segment in self.segments if id(segment.bucket) in chosen]
        for bucket in batch:
            bucket.ready()
        for segment in segments:
            segment.widen()
            segment.load_gradient()
        try:
            if len(batch) == len(self._buckets):
                self._step(segments, factor)
            else:
                with _only(self.optimizer, segments):
                    self._step(segments, factor)
        finally:
            for segment in segments:
                segment.narrow()
            # A loop that still calls the optimizer's own step() must not apply this gradient once
            # more.
            for segment in segments:
                segment.tensor.grad = None

    def _step(self, segments: Sequence[Segment], factor: float) -> None:
        gradients = [segment.tensor.grad for segment in segments if segment.tensor.grad is not None]
        if factor != 1.0 and gradients and self._scales_itself:
            self._step_scaled(1.0 / factor, gradients[0].device)
            return
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        # A rank that owns frozen parameters only steps too: hooks, counters and schedulers go the
        # same way on every rank.
        if self._gaps:
            self.optimizer.step()
        elif gradients:
            with _without_gaps(self.optimizer):
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
            # in place: an optimizer may hold the very list
            group["params"][:] = [
                segment.tensor for segment in self.segments if segment.bucket.group == index
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


def _goes_alone(bucket: FlatBucket) -> bool:
    return bucket.is_on_host or bucket.state_dtype != bucket.master.dtype


@contextmanager
def _without_gaps(optimizer: Optimizer) -> Iterator[None]:
    """Within, the optimizer has only tensors with a gradient, and only groups that have some."""
    with _shown(optimizer, lambda tensor: tensor.grad is not None):
        groups = list(optimizer.param_groups)
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        try:
            yield
        finally:
            optimizer.param_groups[:] = groups


@contextmanager
def _shown(optimizer: Optimizer, holds: Callable[[Tensor], bool]) -> Iterator[None]:
    """Within, the optimizer has only the tensors that `holds` is true of."""
    groups = list(optimizer.param_groups)
    params = [list(group["params"]) for group in groups]
    for group, tensors in zip(groups, params, strict=True):
        group["params"][:] = filter(holds, tensors)
    try:
        yield
    finally:
        for group, tensors in zip(groups, params, strict=True):
            group["params"][:] = tensors


def _only(optimizer: Optimizer, segments: Sequence[Segment]) -> AbstractContextManager[None]:
    """Within, the optimizer has only these segments."""
    tensors = {id(segment.tensor) for segment in segments}
    return _shown(optimizer, lambda tensor: id(tensor) in tensors)
