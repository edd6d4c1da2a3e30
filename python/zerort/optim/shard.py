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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from zerort.errors import StepError
from zerort.memory import FlatModel, Form, Stepped
from zerort.optim.chain import Chain, members_of, name_of
from zerort.optim.initial import InitialState
from zerort.optim.muon import is_muon, matrix
from zerort.optim.probe import Abilities, is_known
from zerort.optim.segments import Segment, flat_segments, runs, shaped_segments

__all__ = ["ShardOptimizer"]


class ShardOptimizer:
    """Steps `optimizer` over segments instead of the module's parameters.

    A group that is of whole parameters gets a shaped segment for each that this rank owns, and the
    plan cuts none. An optimizer that cannot step over gaps is shown
    only groups and tensors that have a gradient.
    """

    def __init__(
        self, optimizer: Optimizer, flat: FlatModel, abilities: Sequence[Abilities]
    ) -> None:
        self.optimizer = optimizer
        self._buckets = flat.stepped
        self._parts: list[_Part] = []
        for member, can in zip(members_of(optimizer), abilities, strict=True):
            first = self._parts[-1].groups.stop if self._parts else 0
            self._parts.append(_Part(member, range(first, first + len(member.param_groups)), can))
        self._initial = InitialState(optimizer, flat.params)
        self._of: dict[int, list[Segment]] = {}
        """By the id of their bucket."""
        self.restart(lambda _: None)

    @property
    def name(self) -> str | None:
        """Of the optimizer's class, or of several."""
        return name_of(self.optimizer)

    @property
    def kinds(self) -> Sequence[str]:
        """The class of each group's optimizer."""
        return [type(part.optimizer).__qualname__ for part in self._parts for _ in part.groups]

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimizer's own."""
        return self.optimizer.param_groups

    def relocate(self, flat: FlatModel) -> None:
        """The model has other buckets; the optimizer has the state that it began with."""
        self._buckets = flat.stepped
        self.restart(lambda _: None)

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
        return [segment for bucket in self._buckets for segment in self._part(bucket).cut(bucket)]

    def _part(self, bucket: Stepped) -> _Part:
        """Who updates a bucket."""
        return next(part for part in self._parts if bucket.group in part.groups)

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

    def settle_rates(self) -> None:
        """Something may have written learning rates."""
        if isinstance(self.optimizer, Chain):
            self.optimizer.keep_ratios()

    def batches(self, order: Sequence[int] = ()) -> list[list[Stepped]]:
        """Buckets that are updated together, in the order of the plan. One on the host is updated
        alone, so that its parameters are sent while the next is updated, and one that is widened
        for it, so that no more is wide at once: where that is torch's own optimizer, and no hook
        listens to its step. With an `order`, of buckets by number, each is alone, and they are in
        it.
        """
        alone = order or any(map(_goes_alone, self._buckets))
        if not alone or not self.steps_in_parts:
            return [self._buckets]
        if order:
            place = {number: index for index, number in enumerate(order)}
            last = len(place)
            ordered = sorted(self._buckets, key=lambda bucket: place.get(bucket.spec.id, last))
            return [[bucket] for bucket in ordered]
        found: list[list[Stepped]] = []
        for alone, run in groupby(self._buckets, key=_goes_alone):
            together = list(run)
            found += [[bucket] for bucket in together] if alone else [together]
        return found

    @property
    def whole(self) -> bool:
        """Whether some group is of whole parameters, as many however they lie in buckets."""
        return any(part.is_whole for part in self._parts)

    @property
    def steps_in_parts(self) -> bool:
        """Whether it may update some buckets and then others: where that is torch's own optimizer,
        and no hook listens to its step.
        """
        stepped = {self.optimizer, *members_of(self.optimizer)}
        heard = [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
        return is_known(self.optimizer) and not any(heard) and not any(map(_is_watched, stepped))

    def step(self, factor: float, batch: Sequence[Stepped]) -> None:
        """One update of these buckets, with the reduced gradients times `factor`."""
        self.settle_rates()
        segments = [segment for bucket in batch for segment in self._of.get(id(bucket), ())]
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
        shown = [segment for segment in segments if segment.tensor.grad is not None]
        with ExitStack() as stack:
            for part in self._parts:
                held = [segment for segment in shown if segment.bucket.group in part.groups]
                if factor != 1.0 and held:
                    part.scale([segment.tensor.grad for segment in held], factor, stack)
                if not part.gaps:
                    stack.enter_context(_without_gaps(part.optimizer))
            # A rank that owns frozen parameters only steps too: hooks, counters and schedulers go
            # the same way on every rank.
            if self.optimizer.param_groups:
                self.optimizer.step()

    def _regroup(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            # in place: an optimizer may hold the very list
            group["params"][:] = [
                segment.tensor for segment in self.segments if segment.bucket.group == index
            ]
        self._of.clear()
        for segment in self.segments:
            self._of.setdefault(id(segment.bucket), []).append(segment)
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


class _Part:
    """An optimizer, with its `groups` among those of all; it may be the only one."""

    def __init__(self, optimizer: Optimizer, groups: range, abilities: Abilities) -> None:
        self.optimizer, self.groups, self.gaps = optimizer, groups, abilities.gaps
        self._whole = {groups[index] for index in abilities.whole}
        self._form: Callable[[str, Form], Form] = matrix if is_muon(optimizer) else _as_it_is
        # Said by torch of its own classes; a subclass may do without.
        self._scales_itself = (
            is_known(optimizer)
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            and all(group.get("fused") for group in optimizer.param_groups)
        )

    @property
    def is_whole(self) -> bool:
        """Whether a group of it is of whole parameters."""
        return bool(self._whole)

    def cut(self, bucket: Stepped) -> list[Segment]:
        """What the optimizer sees of a bucket of its own."""
        if bucket.group in self._whole:
            return shaped_segments(bucket, self._form)
        return flat_segments(bucket)

    def scale(self, gradients: list[Any], factor: float, stack: ExitStack) -> None:
        """The optimizer's next step is over `gradients` times `factor`; `stack` takes that back.

        Fused kernels divide on the way, which saves a pass over the gradients; GradScaler uses the
        same attributes.
        """
        if not self._scales_itself:
            torch._foreach_mul_(gradients, factor)
            return
        scaled: Any = self.optimizer
        scaled.grad_scale = torch.full(
            (), 1.0 / factor, dtype=torch.float32, device=gradients[0].device
        )
        scaled.found_inf = None
        stack.callback(vars(scaled).pop, "grad_scale")
        stack.callback(vars(scaled).pop, "found_inf")


def _as_it_is(name: str, form: Form) -> Form:
    return form


def _is_watched(optimizer: Optimizer) -> bool:
    """Whether a hook would see it step in parts."""
    own = vars(optimizer).get("step")
    counted = own is None or hasattr(own, "_wrapped_by_lr_sched")
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return not counted or any(getattr(optimizer, name, None) for name in hooks)


def _goes_alone(bucket: Stepped) -> bool:
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


def _shown(optimizer: Optimizer, holds: Callable[[Tensor], bool]) -> AbstractContextManager[None]:
    """Within, the optimizer has only the tensors that `holds` is true of."""
    return _holding(
        optimizer, [list(filter(holds, group["params"])) for group in optimizer.param_groups]
    )


def _only(optimizer: Optimizer, segments: Sequence[Segment]) -> AbstractContextManager[None]:
    """Within, the optimizer has only these segments. The others are not looked at one by one: a
    step of hundreds of buckets calls this for each.
    """
    tensors: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for segment in segments:
        tensors[segment.bucket.group].append(segment.tensor)
    return _holding(optimizer, tensors)


@contextmanager
def _holding(optimizer: Optimizer, tensors: Sequence[list[Tensor]]) -> Iterator[None]:
    """Within, the optimizer's groups have these tensors, in place: it may hold the very lists."""
    groups = list(optimizer.param_groups)
    params = [list(group["params"]) for group in groups]
    for group, shown in zip(groups, tensors, strict=True):
        group["params"][:] = shown
    try:
        yield
    finally:
        for group, held in zip(groups, params, strict=True):
            group["params"][:] = held
