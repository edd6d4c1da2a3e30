"""Which of a module's parameters are planned, and what the plan knows of each.

What the optimizer holds is planned, trainable or frozen, in every dtype that can be reduced. Where
parameters are sharded, frozen ones that no optimizer holds (the base of a model that trains by its
adapters) are planned too, in no group: they are *held*. Where there is no optimizer at all, so is
everything, frozen or not. The rest stays as it is, whole on every rank: parameters of another dtype
(quantised ones, masks, complex tables), those that share their memory or have none of their own,
and what requires grad and is in no group of an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zerort import _core
from zerort.errors import PlanError
from zerort.memory.forms import Form
from zerort.memory.origins import Origin, Present

__all__ = ["DTYPES", "PlannedParameter", "Signature", "plannable"]

DTYPES: dict[torch.dtype, _core._Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}
"""What can be reduced, under the core's names."""


Signature = tuple[str, tuple[int, ...], tuple[int, ...], str, int | None]
"""Name, shape, strides that are not those of the shape, dtype, group."""


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter under plan; its id is its position in registration order."""

    name: str
    tensor: nn.Parameter
    group: int | None
    """Of the optimizer; None where it is only held."""
    wire: int
    """Number of the format that its gradient is sent in."""
    form: Form
    origin: Origin
    """Where its values are."""

    def spec(self) -> tuple[int, _core._Dtype, int | None, int]:
        """What the core needs to know of it."""
        return self.tensor.numel(), DTYPES[self.tensor.dtype], self.group, self.wire

    def signature(self) -> Signature:
        """What every rank must agree on."""
        form = self.form
        return self.name, form.shape, form.order, str(self.tensor.dtype), self.group


def plannable(
    named: Sequence[tuple[str, nn.Parameter]],
    groups: Mapping[int, int] | None,
    wire_of: Callable[[nn.Parameter], int],
    origin_of: Callable[[nn.Parameter], Origin] = Present,
    *,
    holds: bool = False,
) -> list[PlannedParameter]:
    """The parameters of `named` that the optimizer updates, checked, and where it `holds` the
    frozen others too; `groups` maps id(parameter) to its group, and is None without an optimizer.

    Raises `PlanError` naming the parameter that cannot be planned.
    """
    trains, groups = groups is not None, groups or {}
    planned = []
    others = [p for _, p in named if id(p) not in groups and not (trains and p.requires_grad)]
    held = _holdable(others, named, origin_of) if holds else set()
    for name, parameter in named:
        if id(parameter) in held:
            form, origin = Form.of(parameter), origin_of(parameter)
            planned.append(PlannedParameter(name, parameter, None, 0, form, origin))
        elif id(parameter) not in groups:
            continue
        elif parameter.dtype in DTYPES:
            group, wire = groups[id(parameter)], wire_of(parameter)
            form, origin = Form.of(parameter), origin_of(parameter)
            planned.append(PlannedParameter(name, parameter, group, wire, form, origin))
        elif parameter.requires_grad:
            raise PlanError(
                f"parameter {name} has dtype {parameter.dtype}, which cannot be reduced: "
                f"{_way_out(parameter.dtype)}, or freeze it with requires_grad_(False)"
            )
    _refuse_overlap([member for member in planned if member.group is not None])
    if trains and not any(member.tensor.requires_grad for member in planned):
        raise PlanError(
            "the model has no parameter that requires grad and belongs to the optimizer: nothing "
            "to train; for an engine that only runs forward give no optimizer"
        )
    return planned


def _holdable(
    others: Sequence[nn.Parameter],
    named: Sequence[tuple[str, nn.Parameter]],
    origin_of: Callable[[nn.Parameter], Origin],
) -> set[int]:
    """Ids of those of `others`, which no optimizer has, whose values can be moved into a bucket."""
    held = {id(parameter) for parameter in others if parameter.dtype in DTYPES}
    present = [p for _, p in named if isinstance(origin_of(p), Present)]
    plain = [p for p in present if _is_plain(p)]
    spans = sorted((*_span(p), id(p)) for p in plain if p.numel())
    reached: tuple[int, int] | None = None  # where what lies before ends, and whose that is
    for start, end, parameter in spans:
        if reached is not None and start < reached[0]:
            held -= {parameter, reached[1]}
        reached = max(reached or (end, parameter), (end, parameter))
    return held - ({id(p) for p in present} - {id(p) for p in plain})


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether its values are an array in memory of its own, each element once."""
    if parameter.layout is not torch.strided or is_traceable_wrapper_subclass(parameter):
        return False
    start, end = _span(parameter)
    return not parameter.numel() or end - start >= parameter.numel() * parameter.itemsize


def _way_out(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "store it as torch.view_as_real(...)"
    return "cast it to float32, bfloat16, float16 or float64 before zerort.initialize"


def _refuse_overlap(planned: Sequence[PlannedParameter]) -> None:
    """Raises `PlanError` naming two parameters one of which lies over the other: in buckets they
    would part.
    """
    spans = sorted(
        (*_span(member.tensor), index)
        for index, member in enumerate(planned)
        if member.tensor.numel() and isinstance(member.origin, Present)
    )
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            first, second = (planned[index].name for index in sorted((one, other)))
            raise PlanError(
                f"parameters {first} and {second} are two Parameter objects over the same memory, "
                "or interleaved in it: tie weights by assigning the same Parameter "
                f"(module.{second} = module.{first}), or give each memory of its own, "
                "nn.Parameter(tensor.clone())"
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address and the one behind the last, gaps between strides included."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize
