"""A parameter that is sharded and in no engine: a part on each rank, until an engine takes it. It
has been so from its birth, or since its last engine has gone.

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

from zerort.memory import Form, Freeable, unintercepted
from zerort.mesh import Comm
from zerort.params import sharded
from zerort.zero.cuts import Cut, Even
from zerort.zero.legacy import Legacy

__all__ = ["Born", "Serial", "exchange"]

Serial = tuple[str, int]
"""Of a parameter, and equal on all ranks: the engine that it had, if any, and its number there."""


class Born:
    """`part` holds this rank's elements in the order in which they lie in memory, with padding
    behind the last where parts are equal. An `Origin`: a bucket takes its values by `fill`.
    """

    __slots__ = (
        "_cut",
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
        self, parameter: nn.Parameter, cut: Cut, serial: Serial, dtype: torch.dtype
    ) -> None:
        self._parameter = weakref.ref(parameter)  # a model that is dropped goes
        self.serial = serial
        self.dtype = dtype
        """In which it is when its model is complete."""
        self.lent = False
        """There has been an alias of the values, and may have written to it."""
        self._cut = cut
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
        parameter = self.parameter
        self._form = Form.of(parameter)
        self.part = self._nothing(parameter.dtype, device)
        lo, hi = self._within(parameter.numel())
        flat = _flat(parameter.detach(), self._form)
        with torch.no_grad():
            self.part.narrow(0, 0, hi - lo).copy_(flat.narrow(0, lo, hi - lo))
        self._settle_in(parameter.dtype, device)

    def make(self, device: torch.device, read: Callable[[int, int], Tensor]) -> None:
        """Keeps this rank's part of what `read(lo, hi)` gives, elements in the order of indices;
        the parameter, which is on the meta device, goes to `device`.
        """
        parameter = self.parameter
        self._form, numel, dtype = Form.of(parameter), parameter.numel(), parameter.dtype
        self.part = self._nothing(dtype, device)
        lo, hi = self._within(numel)
        if self._form.order:  # elements lie in another order than they are read in
            whole = read(0, numel).reshape(self._form.shape)
            own = _flat(whole, self._form).narrow(0, lo, hi - lo)
        else:
            own = read(lo, hi)
        self.part.narrow(0, 0, hi - lo).copy_(own)
        exchange(parameter, torch.empty(0, dtype=dtype, device=device))
        self._settle_in(dtype, device)

    @unintercepted
    def inherit(self, part: Tensor) -> None:
        """This rank's part is here already; the parameter is a view of what is not."""
        self._form, self.part = Form.of(self.parameter), part
        self._settle_in(part.dtype, self.parameter.device)

    def _nothing(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for this rank's part."""
        lo, hi = self._cut.own
        return torch.zeros(hi - lo, dtype=dtype, device=device)

    def _within(self, numel: int) -> tuple[int, int]:
        """Which elements are this rank's, without padding."""
        lo, hi = self._cut.own
        return min(lo, numel), min(hi, numel)

    def _settle_in(self, dtype: torch.dtype, device: torch.device) -> None:
        """The parameter is a view of memory of its own, which is empty."""
        self._values = Freeable(self._cut.extent, [self._form], dtype, device)
        self._values.leave([self.parameter])

    @unintercepted
    def copy(self, parameter: nn.Parameter, serial: Serial) -> Born:
        """The same part for a new `parameter`, which has no values."""
        twin = Born(parameter, self._cut, serial, self.dtype)
        twin._form, twin.part = self._form, self.part.clone()
        twin._settle_in(self.part.dtype, self.device)
        return twin

    @unintercepted
    def cast(self, dtype: torch.dtype) -> None:
        """In another dtype from now on."""
        if self.part.dtype != dtype:
            self.part = self.part.to(dtype)
            self._settle_in(dtype, self.device)

    @property
    def legacy(self) -> Legacy | None:
        """Of which engine it is, if of one."""
        return self._cut.legacy

    @property
    def device(self) -> torch.device:
        """Where its values are when they are whole."""
        return self._values.tensor.device

    @property
    def _comm(self) -> Comm:
        return self._cut.comm

    # Whole for a while.

    def gather(self, *, values: bool = True) -> None:
        """All values, from all ranks; without `values` there is memory, and only this rank's part
        in it. Nested calls gather once; each needs a `release`.
        """
        self._users += 1
        if self._users == 1:
            self._bring()
            if values:
                self._cut.gather(self._values.tensor)

    def spread(self, source: int) -> None:
        """Rank `source`'s values are everybody's."""
        self._comm.broadcast(self._values.tensor, source)

    @unintercepted
    def keep(self) -> None:
        """This rank's part is what the values are now, whatever memory they are in."""
        if not self.is_in_place:
            self._cut = Even(self._comm, self.parameter.numel())
            self.take(self.device)
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
        lo, hi = self._cut.own
        return self._values.tensor.narrow(0, lo, hi - lo)


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
