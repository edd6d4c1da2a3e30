"""Flat buffers: one per bucket, of which the module's parameters are views.

What this guarantees: the core alone decides where a parameter, a shard or a fragment lies (tensors
are made from the buffers it hands out, by DLPack, without a copy), every view has a storage of its
own, so that savers which keep one name per storage keep them all, and a parameter that has left its
buffer is found and named before its gradient is lost. What it does not do: no communication, no
arithmetic, no knowledge of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.errors import PlanError, StepError

__all__ = ["DTYPES", "FlatBucket", "FlatModel", "Memory", "Planned", "laid_out_like"]

DTYPES: dict[torch.dtype, _core._Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}


@dataclass(frozen=True)
class Planned:
    """A parameter under plan; its id is its position in registration order."""

    name: str
    tensor: nn.Parameter
    group: int
    wire: int
    """Number of the format that its gradient travels in."""

    def spec(self) -> tuple[int, _core._Dtype, int, int]:
        """What the core needs to know of it."""
        return self.tensor.numel(), DTYPES[self.tensor.dtype], self.group, self.wire

    def signature(self) -> tuple[str, tuple[int, ...], str, int]:
        """What every rank must agree on."""
        return self.name, tuple(self.tensor.shape), str(self.tensor.dtype), self.group


class Memory:
    """A flat piece of memory as both sides see it: torch's tensor and the core's buffer, over the
    same bytes.
    """

    __slots__ = ("buffer", "tensor")

    def __init__(self, tensor: Tensor, buffer: _core.Buffer) -> None:
        self.tensor = tensor
        self.buffer = buffer

    @classmethod
    def zeros(cls, numel: int, dtype: torch.dtype, device: torch.device) -> Memory:
        """Fresh memory (numel,), touched: a page's first touch costs more than all its later use in
        a step.
        """
        tensor = torch.empty(numel, dtype=dtype, device=device).zero_()
        return cls(tensor, _core.Buffer(tensor))

    @classmethod
    def of_bucket(
        cls, plan: _core.Plan, bucket: _core.Bucket, dtype: torch.dtype, device: torch.device
    ) -> Memory:
        """Fresh memory for a whole bucket, which knows the bucket's shards and fragments."""
        tensor = torch.empty(bucket.numel, dtype=dtype, device=device).zero_()
        return cls(tensor, _core.Buffer(tensor, plan, bucket.id))

    @classmethod
    def over(cls, buffer: _core.Buffer) -> Memory:
        """The tensor over a buffer that the core handed out."""
        return cls(from_dlpack(buffer), buffer)

    def shard(self, rank: int) -> Memory:
        """One rank's slice of a bucket's memory."""
        return Memory.over(self.buffer.shard(rank))

    def typed(self, dtype: torch.dtype, start: int, length: int) -> Memory:
        """Elements start..start+length of these bytes, read as `dtype`."""
        tensor = self.tensor.view(dtype).narrow(0, start, length)
        return Memory(tensor, _core.Buffer(tensor))


def laid_out_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` (numel,) as a view with `parameter`'s shape, keeping a dense memory format such as
    channels-last.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    return flat.as_strided(parameter.shape, strides)


@dataclass(frozen=True)
class Place:
    """What decides where memory lies and how much of it there is."""

    plan: _core.Plan
    rank: int
    sums: torch.dtype = torch.float32
    """What gradients of less than fp32 are added up in."""
    local_sums: bool = False
    """Micro-batches are added up on this rank before they travel."""


class FlatBucket:
    """One bucket's memory on this rank.

    `values` holds the parameters, whole, in their own dtype. `owned` is the part of it whose
    optimizer state this rank keeps: its shard, or the whole where the optimizer is replicated.
    `master` is the optimizer's copy of `owned` in fp32, the same memory where the parameters are
    fp32 themselves. `accum` is the reduced gradient of `owned`, and `landing` the part of it that
    this rank sums: its shard. `local` is this rank's own gradient of the whole bucket, summed over
    micro-batches, where that is the rule and takes a wider dtype than the parameters' (`widens`).
    It has left when the reduced one arrives, so `accum` is a part of the same memory.
    """

    __slots__ = (
        "accum",
        "landing",
        "local",
        "master",
        "names",
        "owned",
        "params",
        "spec",
        "squares",
        "start",
        "values",
        "views",
        "widens",
    )

    def __init__(self, place: Place, spec: _core.Bucket, members: Sequence[Planned]) -> None:
        plan, rank = place.plan, place.rank
        first = members[0].tensor
        self.spec = spec
        self.names = [member.name for member in members]
        self.params = [member.tensor for member in members]
        self.values = Memory.of_bucket(plan, spec, first.dtype, first.device)
        self.views = [
            laid_out_like(from_dlpack(self.values.buffer.fragment(index)), parameter)
            for index, parameter in zip(spec.params, self.params, strict=True)
        ]
        self._move_in()
        precise = torch.float64 if first.dtype == torch.float64 else torch.float32
        whole = not plan.shards_optimizer
        self.start = 0 if whole else rank * spec.shard_numel
        self.owned = self.values if whole else self.values.shard(rank)
        self.master = self.owned.tensor if first.dtype == precise else self.owned.tensor.to(precise)
        sums = place.sums if precise == torch.float32 else precise
        self.widens = self.has_master and sums != first.dtype
        local = place.local_sums and self.widens
        everything = Memory.of_bucket(plan, spec, sums, first.device) if whole or local else None
        self.local = everything if local else None
        self.landing = (
            everything.shard(rank)
            if everything
            else Memory.zeros(spec.shard_numel, sums, first.device)
        )
        self.accum = everything if everything and whole else self.landing
        self.squares: float | Tensor = 0.0

    def _move_in(self) -> None:
        with torch.no_grad():
            for parameter, view in zip(self.params, self.views, strict=True):
                view.copy_(parameter)
                parameter.data = view

    @property
    def has_master(self) -> bool:
        """Whether the optimizer's copy is memory of its own."""
        return self.master is not self.owned.tensor

    def write_back(self) -> None:
        """Casts the updated masters into the parameters this rank owns."""
        if self.has_master:
            self.owned.tensor.copy_(self.master)

    def refresh_master(self) -> None:
        """Takes over what something outside a step has written into the parameters, such as
        load_state_dict.
        """
        if self.has_master:
            values = self.owned.tensor
            # Where the cast of a master still is the parameter, nothing was written, and the master
            # knows more.
            torch.where(
                self.master.to(values.dtype) == values,
                self.master,
                values.to(self.master.dtype),
                out=self.master,
            )

    def slots(self, send: Tensor) -> list[Tensor]:
        """Views of a send buffer (numel,), one per parameter, in the layout of its gradient.

        Each has a version counter of its own (that is what `.data` is for), which shows when
        autograd has added to it.
        """
        pieces = zip(self.spec.offsets, self.spec.numels, self.params, strict=True)
        return [
            laid_out_like(send.narrow(0, start, length), parameter).data
            for start, length, parameter in pieces
        ]


class FlatModel:
    """All buckets of a model. Construction moves every planned parameter into its bucket."""

    def __init__(self, module: nn.Module, planned: Sequence[Planned], place: Place) -> None:
        self.names = [member.name for member in planned]
        self.params = [member.tensor for member in planned]
        self.buckets = [
            FlatBucket(place, spec, [planned[index] for index in spec.params])
            for spec in place.plan.buckets
        ]
        self._pointers = [parameter.data_ptr() for parameter in self.params]
        self._registrations = list(_registrations(module, self.params))
        self._mastered = any(bucket.has_master for bucket in self.buckets)
        self._versions = self._current()

    def active(self) -> list[bool]:
        """Which parameters require grad now."""
        return [parameter.requires_grad for parameter in self.params]

    def check(self) -> None:
        """Raises `StepError` naming the first parameter that has left its buffer, or its module."""
        if [parameter.data_ptr() for parameter in self.params] != self._pointers:
            moved = next(i for i, p in enumerate(self.params) if p.data_ptr() != self._pointers[i])
            raise StepError(
                f"parameter {self.names[moved]} has left its flat buffer since initialize: "
                f"{_LEAVING}"
            )
        if not all(
            registered.get(key) is parameter for registered, key, parameter in self._registrations
        ):
            gone = next(
                p for registered, key, p in self._registrations if registered.get(key) is not p
            )
            name = next(name for name, p in zip(self.names, self.params, strict=True) if p is gone)
            raise StepError(
                f"parameter {name} has been replaced by another since initialize: {_LEAVING}"
            )

    def zero_grad(self) -> None:
        """Drops what autograd has accumulated and no pass has taken."""
        for parameter in self.params:
            parameter.grad = None

    def take_writes(self) -> None:
        """Brings to the masters what something outside a step has written into parameters, such as
        load_state_dict.

        Autograd's version counters tell whether anything has; writes through `.data` are invisible
        to them, and are undone by the masters.
        """
        if self._versions and self._versions != self._current():
            for bucket in self.buckets:
                bucket.refresh_master()
            self._versions = self._current()

    def published(self) -> None:
        """Tells autograd that the parameters were written through their flat buffers, which it
        cannot see.
        """
        torch.autograd.graph.increment_version(self.params)
        self._versions = self._current()

    def _current(self) -> list[int]:
        """Version counters, where there are masters that could differ from parameters."""
        return [parameter._version for parameter in self.params] if self._mastered else []


_LEAVING = (
    ".to(), .half(), .double(), load_state_dict(assign=True), a parametrization, an assignment or "
    "a second initialize gave the module other memory; do that before zerort.initialize, and load "
    "values with load_state_dict(assign=False)"
)

Registration = tuple[dict[str, nn.Parameter | None], str, nn.Parameter]


def _registrations(module: nn.Module, params: Sequence[nn.Parameter]) -> Iterator[Registration]:
    """Where each parameter is registered: its module's dictionary, its key there, and itself."""
    planned = {id(parameter) for parameter in params}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in planned:
                yield part._parameters, key, parameter


def plannable(
    named: Iterable[tuple[str, nn.Parameter]],
    groups: Mapping[int, int],
    wire_of: Callable[[nn.Parameter], int],
) -> list[Planned]:
    """The parameters of `named` that the optimizer updates, checked; `groups` maps id(parameter) to
    its group.

    Raises `PlanError` naming the parameter that cannot be planned.
    """
    planned = []
    for name, parameter in named:
        if id(parameter) not in groups:
            continue
        dtype = parameter.dtype
        if dtype not in DTYPES:
            advice = (
                "store it as torch.view_as_real(...)"
                if dtype.is_complex
                else "cast it before initialize"
            )
            raise PlanError(
                f"parameter {name} has dtype {dtype}, which cannot be reduced: {advice}"
            )
        planned.append(Planned(name, parameter, groups[id(parameter)], wire_of(parameter)))
    _refuse_overlap(planned)
    if not any(member.tensor.requires_grad for member in planned):
        raise PlanError(
            "the model has no parameter that requires grad and belongs to the optimizer: nothing "
            "to train"
        )
    return planned


def _refuse_overlap(planned: Sequence[Planned]) -> None:
    """Raises `PlanError` naming two parameters one of which lies over the other: in buckets they
    would part.
    """
    spans = sorted(
        (*_span(member.tensor), index)
        for index, member in enumerate(planned)
        if member.tensor.numel()
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
