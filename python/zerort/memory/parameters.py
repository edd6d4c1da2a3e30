"""Which of a module's parameters are planned, and what the plan knows of each.

What the optimizer holds is planned, trainable or frozen, in every dtype that can be reduced. What
it does not hold, and frozen parameters of another dtype (quantised ones, masks, complex tables),
stay as they are: every rank has them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from zerort import _core
from zerort.errors import PlanError
from zerort.memory.origins import Origin, Present
from zerort.memory.values import Form

__all__ = ["DTYPES", "PlannedParameter", "Signature", "plannable"]

DTYPES: dict[torch.dtype, _core._Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}
"""What can be reduced, under the core's names."""


Signature = tuple[str, tuple[int, ...], tuple[int, ...], str, int]
"""Name, shape, strides that are not those of the shape, dtype, group."""


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter under plan; its id is its position in registration order."""

    name: str
    tensor: nn.Parameter
    group: int
    wire: int
    """Number of the format that its gradient is sent in."""
    form: Form
    origin: Origin
    """Where its values are."""

    def spec(self) -> tuple[int, _core._Dtype, int, int]:
        """What the core needs to know of it."""
        return self.tensor.numel(), DTYPES[self.tensor.dtype], self.group, self.wire

    def signature(self) -> Signature:
        """What every rank must agree on."""
        form = self.form
        return self.name, form.shape, form.order, str(self.tensor.dtype), self.group


def plannable(
    named: Iterable[tuple[str, nn.Parameter]],
    groups: Mapping[int, int],
    wire_of: Callable[[nn.Parameter], int],
    origin_of: Callable[[nn.Parameter], Origin] = Present,
) -> list[PlannedParameter]:
    """The parameters of `named` that the optimizer updates, checked; `groups` maps id(parameter) to
    its group.

    Raises `PlanError` naming the parameter that cannot be planned.
    """
    planned = []
    for name, parameter in named:
        if id(parameter) not in groups:
            continue
        if parameter.dtype in DTYPES:
            group, wire = groups[id(parameter)], wire_of(parameter)
            form, origin = Form.of(parameter), origin_of(parameter)
            planned.append(PlannedParameter(name, parameter, group, wire, form, origin))
        elif parameter.requires_grad:
            raise PlanError(
                f"parameter {name} has dtype {parameter.dtype}, which cannot be reduced: "
                f"{_way_out(parameter.dtype)}, or freeze it with requires_grad_(False)"
            )
    _refuse_overlap(planned)
    if not any(member.tensor.requires_grad for member in planned):
        raise PlanError(
            "the model has no parameter that requires grad and belongs to the optimizer: nothing "
            "to train"
        )
    return planned


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
