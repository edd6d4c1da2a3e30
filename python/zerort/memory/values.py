"""Flat memory, and the parameters of a bucket in it.

`Memory` is a flat piece as torch's tensor and as the core's buffer. `Resident` holds a bucket's
parameters, whole, for as long as the engine lives: the core alone decides where each of them lies,
and a view by DLPack is made over each piece without a copy. Every view has a storage of its own, so
that savers which keep one name per storage keep them all. `Freeable` holds them in one storage of
torch's, whose memory is given back and brought back while the parameters stay views of it: neither
their versions nor what autograd has saved of them change by that.

What it does not do: no communication, no arithmetic, no knowledge of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.memory.moved import Carrier

__all__ = ["Alone", "Extent", "Form", "Freeable", "Memory", "Resident", "guards"]


_count = getattr(torch._C, "_storage_Use_Count", None)
_OWN_USES = 2
"""Of a storage, by `Freeable`: its tensor, and the storage as Python's object."""


class Memory:
    """A flat piece of memory as both sides see it: torch's tensor and the core's buffer, over the
    same bytes.
    """

    __slots__ = ("_over", "_shards", "buffer", "tensor")

    def __init__(
        self,
        tensor: Tensor,
        buffer: _core.Buffer,
        over: Callable[[Tensor], _core.Buffer] = _core.Buffer,
    ) -> None:
        self.tensor = tensor
        self.buffer = buffer
        self._over = over
        self._shards: list[tuple[int, Memory]] = []

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        """Over a tensor's memory (numel,), contiguous."""
        return cls(tensor, _core.Buffer(tensor))

    @classmethod
    def zeros(cls, numel: int, dtype: torch.dtype, device: torch.device) -> Memory:
        """Fresh memory (numel,), touched: a page's first touch costs more than all its later use in
        a step.
        """
        return cls.of(torch.empty(numel, dtype=dtype, device=device).zero_())

    @classmethod
    def of_bucket(
        cls, plan: _core.Plan, bucket: _core.Bucket, dtype: torch.dtype, device: torch.device
    ) -> Memory:
        """Fresh memory for a whole bucket, which knows the bucket's shards and fragments."""
        tensor = torch.empty(bucket.numel, dtype=dtype, device=device).zero_()

        def over(tensor: Tensor) -> _core.Buffer:
            return _core.Buffer(tensor, plan, bucket.id)

        return cls(tensor, over(tensor), over)

    @classmethod
    def over(cls, buffer: _core.Buffer) -> Memory:
        """The tensor over a buffer that the core handed out."""
        return cls(from_dlpack(buffer), buffer)

    def shard(self, rank: int) -> Memory:
        """One rank's slice of a bucket's memory; it follows where that moves."""
        shard = Memory.over(self.buffer.shard(rank))
        self._shards.append((rank, shard))
        return shard

    def move(self, carry: Carrier) -> None:
        """From now on this is what `carry` brings, and so are its shards. What else was made of the
        old memory keeps that.
        """
        self.tensor = carry(self.tensor)
        self.buffer = self._over(self.tensor)
        for rank, shard in self._shards:
            shard.buffer = self.buffer.shard(rank)
            shard.tensor = from_dlpack(shard.buffer)

    def typed(self, dtype: torch.dtype, start: int, length: int) -> Memory:
        """Elements start..start+length of these bytes, read as `dtype`."""
        return Memory.of(self.tensor.view(dtype).narrow(0, start, length))


@dataclass(frozen=True)
class Form:
    """A parameter's shape, and the dense strides in which its elements lie in flat memory; both in
    elements.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Form:
        """Keeps a dense memory format such as channels-last; gaps between elements are closed. Its
        values may be sharded.
        """
        alike = torch.empty_strided(parameter.shape, parameter.stride(), device="meta")
        return cls(tuple(parameter.shape), tuple(torch.empty_like(alike).stride()))

    @property
    def order(self) -> tuple[int, ...]:
        """The strides, or () where elements lie in the order of their indices. A dimension of one
        element has stride 0, for its own means nothing.
        """
        whole = torch.empty(self.shape, device="meta")
        if whole.as_strided(self.shape, self.strides).is_contiguous():
            return ()
        pairs = zip(self.strides, self.shape, strict=True)
        return tuple(stride if size > 1 else 0 for stride, size in pairs)

    def over(self, flat: Tensor) -> Tensor:
        """`flat` (numel,) as a view in this form."""
        return flat.as_strided(self.shape, self.strides)


class Resident:
    """A bucket's parameters, whole, in their own dtype and on this rank for good."""

    __slots__ = ("_forms", "_params", "_views", "memory")

    def __init__(
        self,
        plan: _core.Plan,
        spec: _core.Bucket,
        forms: Sequence[Form],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.memory = Memory.of_bucket(plan, spec, dtype, device)
        self._params, self._forms = spec.params, forms
        self._cut()

    def _cut(self) -> None:
        self._views = [
            form.over(from_dlpack(self.memory.buffer.fragment(param)))
            for param, form in zip(self._params, self._forms, strict=True)
        ]

    is_whole = True

    @property
    def tensor(self) -> Tensor:
        """All of it, padding included (numel,)."""
        return self.memory.tensor

    def shard(self, rank: int) -> Memory:
        """One rank's slice."""
        return self.memory.shard(rank)

    def views(self) -> Sequence[Tensor]:
        """One for each parameter, in its form."""
        return self._views

    def move(self, carry: Carrier) -> None:
        """Elsewhere; there are new views."""
        self.memory.move(carry)
        self._cut()

    def bring(self) -> None:
        """Nothing: there is memory."""

    @property
    def landing(self) -> Tensor:
        """Where values are to be written (numel,)."""
        return self.tensor

    def land(self) -> None:
        """Nothing: they are where they belong."""

    @property
    def address(self) -> int:
        """Of the first element."""
        return self.tensor.data_ptr()

    def unguarded(self) -> AbstractContextManager[None]:
        """Views may always be asked for their addresses."""
        return nullcontext()


class Extent(Protocol):
    """Where parameters lie in flat memory, in elements: a bucket, as the core has planned it."""

    @property
    def numel(self) -> int:
        """Of all, padding included."""

    @property
    def offsets(self) -> Sequence[int]:
        """Of each parameter."""

    @property
    def numels(self) -> Sequence[int]:
        """Of each parameter."""


class Alone(NamedTuple):
    """A bucket of one parameter, which is not planned."""

    numel: int
    numels: Sequence[int]
    offsets: Sequence[int] = (0,)

    @classmethod
    def of(cls, numel: int, world: int) -> Alone:
        """With an equal part for each of `world` ranks."""
        return cls(-(-numel // world) * world, (numel,))


class Freeable:
    """A bucket's parameters, whole only between `land` and `free`, in their own dtype.

    The memory is torch's, at the core's offsets: what is imported by DLPack cannot be resized. It
    is empty to begin with. What comes is written elsewhere (`landing`), and changes places with the
    parameters' empty storage once it is complete.

    With `contents`, which an error may name, a kernel that reads the storage meanwhile raises
    `RuntimeError` where torch can be asked for that (`guards`): through an alias that was taken
    before, or in a backward that no hook has announced.
    """

    __slots__ = (
        "_arriving",
        "_contents",
        "_forms",
        "_nbytes",
        "_parts",
        "_spec",
        "_storage",
        "tensor",
    )

    def __init__(
        self,
        spec: Extent,
        forms: Sequence[Form],
        dtype: torch.dtype,
        device: torch.device,
        contents: str | None = None,
    ) -> None:
        self._spec, self._forms = spec, forms
        self._contents = contents if guards() else None
        self._renew(dtype, device)
        self._give_back()

    @property
    def is_whole(self) -> bool:
        """Whether the values are there."""
        return self._storage.nbytes() == self._nbytes

    @property
    def landing(self) -> Tensor:
        """Where values are to be written (numel,), behind `bring`."""
        return self.tensor if self.is_whole else self._arriving

    def part(self, start: int, length: int) -> Tensor:
        """Elements of `landing`: always the same ones. To cut them anew at each gather and free
        would cost as much as their copy, where they are few.
        """
        whole = self.is_whole
        part = self._parts.get(whole)
        if part is None:
            part = self._parts[whole] = self.landing.narrow(0, start, length)
        return part

    def views(self) -> list[Tensor]:
        """One for each parameter, in its form."""
        pieces = zip(self._spec.offsets, self._spec.numels, self._forms, strict=True)
        return [form.over(self.tensor.narrow(0, start, length)) for start, length, form in pieces]

    def bring(self) -> None:
        """Memory for the values, whatever is in it; nothing where there is some."""
        if not self.is_whole:
            self._arriving.untyped_storage().resize_(self._nbytes)

    def land(self) -> None:
        """What has been written to `landing` is the parameters'."""
        if self._is_guarded and not self.is_whole:
            self._exchange()

    def free(self, params: Sequence[nn.Parameter]) -> None:
        """Gives the memory back. Where torch has made it fixed, as `parameter.numpy()` does,
        who has exported it keeps it, and `params` become views of another.
        """
        if not self.is_whole:
            self._arriving.untyped_storage().resize_(0)
        elif not self._storage.resizable():
            self.leave(params)
        else:
            self._storage.resize_(0)
            if self._is_guarded:
                self._exchange()

    @property
    def _is_guarded(self) -> bool:
        return self._arriving is not self.tensor

    def _exchange(self) -> None:
        """The guard goes with the memory that it guards."""
        self._storage._swap_data_ptr_(self._arriving.untyped_storage())  # type: ignore[attr-defined]

    @property
    def address(self) -> int:
        """Of the first element; 0 while the values are not there."""
        return self.tensor.data_ptr() if self.is_whole else 0

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """Within, views may be asked for their addresses, which are offsets while the values are
        not there.
        """
        guarded = self._is_guarded and not self.is_whole
        if guarded:
            torch._C._clear_storage_data_ptr_access_error_msg(self._storage._cdata)
        try:
            yield
        finally:
            if guarded:
                self._guard()

    def _guard(self) -> None:
        message = (
            f"the values of {self._contents} are sharded, and something reads the memory in which "
            "they were whole. In a backward: the loss comes from a tensor inside a module that is "
            "not among its outputs; return it from the module's forward, and begin the backward "
            "with engine.backward(loss). Elsewhere: an alias that was taken while they were whole; "
            "use it inside zerort.zero.GatheredParameters(parameters)"
        )
        torch._C._set_storage_data_ptr_access_error_msg(self._storage._cdata, message)

    @property
    def is_aliased(self) -> bool:
        """Whether anything but the parameters has views of this memory, which would read
        what is not there; True where torch does not tell.
        """
        uses = 2**31 if _count is None else _count(self._storage._cdata)
        return bool(uses > len(self._spec.numels) + _OWN_USES + (True in self._parts))

    def leave(self, params: Sequence[nn.Parameter]) -> None:
        """`params` become views of other memory, which is empty; the owner of an alias of this one
        keeps it.
        """
        self._renew(self.tensor.dtype, self.tensor.device)
        with torch.no_grad():
            for parameter, view in zip(params, self.views(), strict=True):
                parameter.data = view
        self._give_back()

    def _renew(self, dtype: torch.dtype, device: torch.device) -> None:
        self._parts: dict[bool, Tensor] = {}
        """What has been asked for of `tensor` and of `_arriving`."""
        self.tensor = torch.empty(self._spec.numel, dtype=dtype, device=device)
        self._storage = self.tensor.untyped_storage()
        self._nbytes = self._storage.nbytes()
        self._arriving = self.tensor

    def _give_back(self) -> None:
        """The memory of a storage that is new."""
        self._storage.resize_(0)
        if self._contents is not None and self._nbytes:
            self._arriving = torch.empty_like(self.tensor)
            self._arriving.untyped_storage().resize_(0)
            self._guard()


@cache
def guards() -> bool:
    """Whether torch can make a storage raise when its memory is read, and the guard changes places
    with the memory. What does that is private.
    """
    names = "_set_storage_data_ptr_access_error_msg", "_clear_storage_data_ptr_access_error_msg"
    if not all(hasattr(torch._C, name) for name in names):
        return False
    if not hasattr(torch.UntypedStorage, "_swap_data_ptr_"):
        return False
    guarded, other = torch.empty(1), torch.empty(1)
    torch._C._set_storage_data_ptr_access_error_msg(guarded.untyped_storage()._cdata, "guarded")
    guarded.untyped_storage()._swap_data_ptr_(other.untyped_storage())  # type: ignore[attr-defined]
    return _reads(guarded) and not _reads(other)


def _reads(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
