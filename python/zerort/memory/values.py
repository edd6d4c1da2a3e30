"""The parameters of a bucket in flat memory.

`Resident` holds them, whole, for as long as the engine lives. Every view has a storage of its own,
so that savers which keep one name per storage keep them all. `Freeable` holds them in one storage
of torch's, whose memory is given back and brought back while the parameters stay views of it:
neither their versions nor what autograd has saved of them change by that.

What it does not do: no communication, no arithmetic, no knowledge of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.memory.flat import Memory
from zerort.memory.forms import Extent, Form
from zerort.memory.guards import guard, guards, has_aliases, unguard
from zerort.memory.moved import Carrier

__all__ = ["Freeable", "Resident"]


_count = getattr(torch._C, "_storage_Use_Count", None)
_OWN_USES = 2
"""Of a storage, by `Freeable`: its tensor, and the storage as Python's object."""


class Resident:
    """A bucket's parameters, whole, in their own dtype and on this rank for good."""

    __slots__ = ("_forms", "_params", "_storages", "_views", "memory")

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
            form.over(from_dlpack(self.memory.buffer.fragment(param))).data  # which holds no base
            for param, form in zip(self._params, self._forms, strict=True)
        ]
        self._storages: list[int] | None = None
        """Of the views, which keep them alive."""

    def aliased(self) -> list[int]:
        """Positions of parameters whose memory something else has views of; all where torch does
        not tell.
        """
        if self._storages is None:
            self._storages = [view.untyped_storage()._cdata for view in self._views]
        return has_aliases(self._storages, tensors=2)  # the view, and the parameter

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
            unguard(self._storage)
        try:
            yield
        finally:
            if guarded and self._contents is not None:
                guard(self._storage, self._contents)

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
            guard(self._storage, self._contents)
