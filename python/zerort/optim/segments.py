"""How a bucket's owned part is cut for an optimizer.

A region is one parameter's elements. A run is as many neighbouring regions as may be treated alike,
and a segment is what the optimizer sees as one parameter: a run, or a whole parameter in its own
shape. Lengths and places are in elements of the owned part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from zerort.memory import Form, Kept, Stepped, unintercepted

__all__ = ["Region", "Run", "Segment", "flat_segments", "regions", "runs", "shaped_segments"]


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


def regions(bucket: Kept) -> Iterator[Region]:
    """What tiles the bucket's owned part. Empty parameters have no region. Where parameters may not
    be cut, those that lie in it, without padding: there may be none.
    """
    end_of_owned = bucket.start + bucket.master.numel()
    spec = bucket.spec
    members = [
        (offset, param, parameter)
        for offset, numel, param, parameter in zip(
            spec.offsets, spec.numels, spec.params, bucket.params, strict=True
        )
        if numel
    ]
    if spec.grain == "whole":
        for offset, param, parameter in members:
            lo, hi = offset, offset + parameter.numel()
            if bucket.start <= lo and hi <= end_of_owned:
                yield Region(lo - bucket.start, hi - bucket.start, param, parameter)
        return
    ends = [*(offset for offset, _, _ in members[1:]), spec.numel]
    for (start, param, parameter), end in zip(members, ends, strict=False):
        lo, hi = max(start, bucket.start), min(end, end_of_owned)
        if lo < hi:
            yield Region(lo - bucket.start, hi - bucket.start, param, parameter)


@dataclass(frozen=True)
class Run:
    """Neighbouring regions, all active or all frozen."""

    start: int
    end: int
    param: int
    """Id of the first parameter."""
    active: bool


@unintercepted
def runs(bucket: Stepped, label: Callable[[int], Hashable]) -> list[Run]:
    """Regions joined as long as neither `requires_grad` nor the parameter's `label` changes."""

    def key(region: Region) -> tuple[bool, Hashable]:
        return region.parameter.requires_grad, label(region.param)

    found = []
    for (active, _), group in groupby(regions(bucket), key=key):
        members = list(group)
        found.append(Run(members[0].start, members[-1].end, members[0].param, active))
    return found


@dataclass
class Segment:
    """A part of a bucket's owned part that the optimizer sees as one parameter."""

    bucket: Stepped
    param: int
    """Id of the parameter that it begins with."""
    start: int
    length: int
    form: Form | None = None
    active: bool = True
    tensor: nn.Parameter = field(init=False)
    _narrow: Tensor | None = field(default=None, init=False)

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

    def follow(self) -> None:
        """The bucket's masters lie elsewhere; the optimizer goes on with the same tensor."""
        self.tensor.data = self.of(self.bucket.master)

    def widen(self) -> None:
        """Shows the optimizer the masters in the dtype that it computes in, until `narrow`."""
        if self.active and self.tensor.dtype != self.bucket.state_dtype:
            self._narrow = self.tensor.data
            self.tensor.data = self._narrow.to(self.bucket.state_dtype)

    def narrow(self) -> None:
        """Rounds what it has made of them."""
        if self._narrow is not None:
            self._narrow.copy_(self.tensor.data)
            self.tensor.data, self._narrow = self._narrow, None

    def load_gradient(self) -> None:
        """Shows the optimizer the reduced gradient, or none where the segment is frozen."""
        gradient = self.of(self.bucket.gradient) if self.active else None
        # torch wants gradients in their parameter's dtype; sums in less than that are widened here.
        self.tensor.grad = None if gradient is None else gradient.to(self.tensor.dtype)

    def cut(self, along: Sequence[Run]) -> list[Segment]:
        """This segment's parts along the runs."""
        parts = []
        for run in along:
            lo, hi = max(run.start, self.start), min(run.end, self.start + self.length)
            if lo < hi:
                param = self.param if lo == self.start else run.param
                parts.append(Segment(self.bucket, param, lo, hi - lo, self.form, run.active))
        return parts


def flat_segments(bucket: Stepped) -> list[Segment]:
    """The owned part in one piece, if it has an element."""
    first = next(regions(bucket), None)
    return [] if first is None else [Segment(bucket, first.param, 0, bucket.master.numel())]


def shaped_segments(
    bucket: Stepped, form_of: Callable[[str, Form], Form] = lambda _, form: form
) -> list[Segment]:
    """One for each parameter that lies in the owned part, which cuts none, in its form or what
    `form_of` makes of its name and that.
    """
    spec, end = bucket.spec, bucket.start + bucket.master.numel()
    pieces = zip(spec.params, spec.offsets, spec.numels, bucket.names, bucket.forms, strict=True)
    return [
        Segment(bucket, param, offset - bucket.start, numel, form_of(name, form))
        for param, offset, numel, name, form in pieces
        if bucket.start <= offset and offset + numel <= end
    ]
