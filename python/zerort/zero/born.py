"""A parameter that is sharded from its birth: an equal part on each rank, until an engine takes it.

What it guarantees: the parameter stays the object it is, with its shape, its strides and its hooks,
and a view of one storage whose memory comes and goes; an alias of that memory that is still held
stays readable. What it does not do: it decides nothing about when its values are whole, and it
asks no other rank anything but in `gather`, `spread` and `fill`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zerort.memory import Alone, Form, Freeable, unintercepted
from zerort.mesh import Comm
from zerort.params import sharded

__all__ = ["Born", "exchange"]


class Born:
    """`part` (each,) holds this rank's elements in the order in which they lie in memory, with
    padding behind the last. An `Origin`: a bucket takes its values by `fill`.
    """

    __slots__ = (
        "_comm",
        "_form",
        "_parameter",
        "_users",
        "_values",
        "dtype",
        "lent",
        "part",
        "serial",
    )

    is_common = True

    def __init__(
        self, parameter: nn.Parameter, comm: Comm, serial: int, dtype: torch.dtype
    ) -> None:
        self._parameter = weakref.ref(parameter)  # a model that is dropped goes
        self.serial = serial
        self.dtype = dtype
        """In which it is when its model is complete."""
        self.lent = False
        """There has been an alias of the values, and may have written to it."""
        self._comm = comm
        self._users = 0

    @property
    def parameter(self) -> nn.Parameter:
        """Which it is. Only while it is alive."""
        parameter = self._parameter()
        assert parameter is not None, "its parameter is gone"
        return parameter

    @property
    def is_alive(self) -> bool:
        """Whether the parameter still exists."""
        return self._parameter() is not None

    @unintercepted
    def take(self, device: torch.device) -> None:
        """Keeps this rank's part of what the parameter holds, on `device`."""
        parameter, dtype = self.parameter, self.parameter.dtype
        self._form = Form.of(parameter)
        extent = Alone.of(parameter.numel(), self._comm.world)
        self.part = torch.zeros(extent.numel // self._comm.world, dtype=dtype, device=device)
        lo, hi = self._own(parameter.numel())
        flat = _flat(parameter.detach(), self._form)
        with torch.no_grad():
            self.part.narrow(0, 0, hi - lo).copy_(flat.narrow(0, lo, hi - lo))
        self._values = Freeable(extent, [self._form], dtype, device)
        self._values.leave([parameter])

    def make(self, device: torch.device, read: Callable[[int, int], Tensor]) -> None:
        """Keeps this rank's part of what `read(lo, hi)` gives, elements in the order of indices;
        the parameter, which is on the meta device, goes to `device`.
        """
        parameter = self.parameter
        self._form, numel, dtype = Form.of(parameter), parameter.numel(), parameter.dtype
        extent = Alone.of(numel, self._comm.world)
        self.part = torch.zeros(extent.numel // self._comm.world, dtype=dtype, device=device)
        lo, hi = self._own(numel)
        if self._form.order:  # elements lie in another order than they are read in
            whole = read(0, numel).reshape(self._form.shape)
            own = _flat(whole, self._form).narrow(0, lo, hi - lo)
        else:
            own = read(lo, hi)
        self.part.narrow(0, 0, hi - lo).copy_(own)
        exchange(parameter, torch.empty(0, dtype=dtype, device=device))
        self._values = Freeable(extent, [self._form], dtype, device)
        self._values.leave([parameter])

    def _own(self, numel: int) -> tuple[int, int]:
        """Which elements are this rank's."""
        lo = min(self._comm.rank * self.part.numel(), numel)
        return lo, min(lo + self.part.numel(), numel)

    @unintercepted
    def copy(self, parameter: nn.Parameter, serial: int) -> Born:
        """The same part for a new `parameter`, which has no values."""
        twin = Born(parameter, self._comm, serial, self.dtype)
        twin._form, twin.part = self._form, self.part.clone()
        extent = Alone.of(parameter.numel(), self._comm.world)
        twin._values = Freeable(extent, [self._form], self.part.dtype, self.part.device)
        twin._values.leave([parameter])
        return twin

    @unintercepted
    def cast(self, dtype: torch.dtype) -> None:
        """In another dtype from now on."""
        if self.part.dtype != dtype:
            values = self.part.to(dtype)
            self._values = Freeable(
                Alone.of(self.parameter.numel(), self._comm.world),
                [self._form],
                dtype,
                values.device,
            )
            self._values.leave([self.parameter])
            self.part = values

    # Whole for a while.

    def gather(self, *, values: bool = True) -> None:
        """All values, from all ranks; without `values` there is memory, and only this rank's part
        in it. Nested calls gather once; each needs a `release`.
        """
        self._users += 1
        if self._users == 1:
            self._bring()
            if values and self.part.numel():
                self._comm.all_gather(self._values.tensor).start().wait()

    def spread(self, source: int) -> None:
        """Rank `source`'s values are everybody's."""
        self._comm.broadcast(self._values.tensor, source)

    @unintercepted
    def keep(self) -> None:
        """This rank's part is what the values are now, whatever memory they are in."""
        if not self.is_in_place:
            self.take(self.part.device)
        elif self._values.is_whole:
            with torch.no_grad():
                self.part.copy_(self._slice())

    def release(self) -> None:
        """The end of a `gather`."""
        self._users -= 1
        if not self._users and not self.lent:
            self.free()

    @unintercepted
    def free(self) -> None:
        """Gives the memory back."""
        self._values.free([self.parameter])

    @unintercepted
    def settle(self, *, ends: bool) -> None:
        """Takes what has been written through an alias, and gives the memory back: if there is
        no alias any more, or to those that there are where building `ends`.
        """
        self.keep()
        if self._users or (not ends and self._values.is_aliased):
            return
        self.lent = False
        if self._values.is_aliased:
            self._values.leave([self.parameter])
        else:
            self.free()

    @property
    def is_held(self) -> bool:
        """Whether a `gather` is open."""
        return self._users > 0

    @property
    def is_in_place(self) -> bool:
        """Whether the parameter is still a view of this memory."""
        with torch._C.DisableTorchFunctionSubclass():
            own = self._values.tensor.untyped_storage()
            return bool(self.parameter.untyped_storage()._cdata == own._cdata)

    @property
    def version(self) -> int:
        """Moves when the parameter is written."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.parameter._version

    # An engine takes it.

    @unintercepted
    def fill(self, view: Tensor) -> None:
        """Its last use: nothing is kept. All ranks call it."""
        self._whole()
        with torch.no_grad():
            view.copy_(self.parameter)
        self._end()

    @unintercepted
    def stay(self) -> None:
        """The parameter is whole for good. All ranks call it."""
        self._whole()
        with torch.no_grad():
            self.parameter.data = self.parameter.detach().clone()
        self._end()

    def _whole(self) -> None:
        if self.lent:
            self.keep()
        self.gather()

    @unintercepted
    def _bring(self) -> None:
        self._values.bring()
        with torch.no_grad():
            self._slice().copy_(self.part)

    def _end(self) -> None:
        self.lent, self._users = False, 0
        self.free()
        self.part = self.part.new_empty(0)
        sharded.leave(self.parameter)

    def _slice(self) -> Tensor:
        each = self.part.numel()
        return self._values.tensor.narrow(0, self._comm.rank * each, each)


def exchange(parameter: nn.Parameter, values: Tensor) -> None:
    """The same Parameter on another device than meta, over `values`."""
    fresh = torch.Tensor._make_subclass(type(parameter), values, parameter.requires_grad)
    # What torch.utils.swap_tensors does to tensors of one class, which refuses those that a weak
    # reference points to, as those of torch's recurrent layers to their own.
    torch._C._swap_tensor_impl(parameter, fresh)


def _flat(values: Tensor, form: Form) -> Tensor:
    """All elements (numel,) in the order in which they lie in memory."""
    if values.layout is torch.strided and values.stride() == form.strides:
        return values.as_strided((values.numel(),), (1,))
    dense = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
    form.over(dense).copy_(values)
    return dense
