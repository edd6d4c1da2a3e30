"""Who waits for parameters that are published beside the next forward.

While a bucket is on its way its parameters are `Arriving`, and each module that has some of them
has a forward pre-hook that waits for the bucket before anything of the module runs: also an
extension that the module gives them to reads what is there. A module that is compiled waits for all
that is below it in front of its compiled frame, which therefore never sees a parameter that is on
its way, nor a hook. Outside of gradient mode, where torch takes other kernels for parameters of the
plain class alone, the first module that runs waits for all.

Hooks are there only while something is on its way: a step pays for two entries in a dictionary a
module and two classes a parameter, a module call behind the first of its bucket pays nothing.

What it does not do: it sends nothing and decides no order.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zerort.errors import CommError
from zerort.memory import FlatBucket, FlatModel, HeldBucket
from zerort.params.arriving import arriving, forget, meet
from zerort.run.executor import Executor

__all__ = ["Publishing"]

Land = Callable[[Sequence[int] | None], None]
"""Waits for buckets, by their number; for all where None."""


class Publishing:
    """Guards `module`'s parameters for `executor`, until `close`."""

    def __init__(self, module: nn.Module, flat: FlatModel, executor: Executor) -> None:
        self._module = module
        self._flat = flat
        self._executor = executor
        self._buckets: dict[int, _Bucket] = {}
        self._parts: list[nn.Module] = []
        self._followed: Any = None
        executor.publication.guard = self
        _OPEN.add(self)

    # What a publication asks for.

    def prepare(self) -> None:
        """Finds buckets, modules, and what is compiled of them, where that has changed. Nothing is
        on its way.
        """
        compiled = [part._compiled_call_impl for part in self._parts]
        if (self._flat.layouts, self._flat.tree_changes, compiled) != self._followed:
            self._follow()

    def conceal(self, bucket: HeldBucket) -> None:
        """The bucket's parameters are on their way."""
        self._buckets[bucket.spec.id].conceal()

    def expose(self, bucket: HeldBucket) -> None:
        """They are there."""
        known = self._buckets.get(bucket.spec.id)
        if known is not None:
            known.expose()

    def land(self, numbers: Sequence[int] | None = None) -> None:
        """Waits for these buckets, for all where None. Raises `CommError`."""
        self._executor.publication.land(numbers)

    def close(self, *, waits: bool = True) -> None:
        """Waits for what is on its way, unless it is not to; from then on the parameters are their
        module's alone. Raises `CommError`. A second call does nothing.
        """
        try:
            if waits:
                self.land()
        finally:
            self._executor.publication.abandon()
            self._forget()
            _OPEN.discard(self)

    # Where there is something to wait for.

    def _follow(self) -> None:
        self._forget()
        self._parts = list(self._module.modules())
        compiled = [part._compiled_call_impl for part in self._parts]
        self._followed = self._flat.layouts, self._flat.tree_changes, compiled
        self._buckets = {
            bucket.spec.id: _Bucket(bucket, self.land) for bucket in self._flat.trained
        }
        home = {id(p): b.spec.id for b in self._flat.trained for p in b.params}
        for part, params in _waiting(self._module, set()):
            numbers = sorted({home[id(p)] for p in params if id(p) in home})
            front = _Front(part, partial(self.land, numbers)) if _compiles(part) else None
            for number in numbers:
                self._buckets[number].add(part, front)

    def _forget(self) -> None:
        for bucket in self._buckets.values():
            bucket.close()
        self._buckets = {}


class _Bucket:
    """A bucket's parameters, and the modules that wait for them."""

    def __init__(self, bucket: FlatBucket, land: Land) -> None:
        self._number, self._params = bucket.spec.id, bucket.params
        self._types: list[type] = []
        self._kinds: list[tuple[type, type, list[nn.Parameter]]] = []
        self._landing = partial(land, (self._number,))
        self._hook = _Hook(self._landing, partial(land, None))
        self._key = RemovableHandle(OrderedDict()).id  # which no hook of a module's has
        self._tables: list[dict[int, Any]] = []
        self._fronts: list[_Front] = []
        self._is_concealed = False
        for parameter in self._params:
            meet(parameter, self._landing)

    def add(self, part: nn.Module, front: _Front | None) -> None:
        """A module waits for the bucket before it is called, in `front` of its compiled frame where
        it has one.
        """
        if front is None:
            self._tables.append(part._forward_pre_hooks)
        else:
            self._fronts.append(front)

    def conceal(self) -> None:
        """Its parameters are on their way. A second call goes on where the first broke off."""
        if not self._is_concealed:
            types = list(map(type, self._params))
            if types != self._types:
                self._group(types)
            self._is_concealed = True
        for _, guarded, params in self._kinds:
            for parameter in params:
                parameter.__class__ = guarded
        key, hook = self._key, self._hook
        for table in self._tables:
            table[key] = hook
        for front in self._fronts:
            front.wait(self._number)

    def expose(self) -> None:
        """They are there. A second call does nothing."""
        if not self._is_concealed:
            return
        for front in self._fronts:
            front.go(self._number)
        key = self._key
        for table in self._tables:
            table.pop(key, None)
        for plain, _, params in self._kinds:
            for parameter in params:
                parameter.__class__ = plain
        self._is_concealed = False

    def close(self) -> None:
        """Nobody asks for them here any more."""
        self.expose()
        for parameter in self._params:
            forget(parameter, self._landing)

    def _group(self, types: list[type]) -> None:
        pairs = list(zip(types, self._params, strict=True))
        self._types = types
        self._kinds = [
            (kind, arriving(kind), [p for its, p in pairs if its is kind])
            for kind in dict.fromkeys(types)
        ]


class _Hook:
    """A forward pre-hook: waits for one bucket, or `all`."""

    __slots__ = ("_all", "_landing")

    def __init__(self, landing: Callable[[], None], every: Callable[[], None]) -> None:
        self._landing, self._all = landing, every

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Before a module is called."""
        (self._landing if torch.is_grad_enabled() else self._all)()


class _Front:
    """What runs in the place of a compiled module's frame while buckets of it are on their way."""

    def __init__(self, part: nn.Module, landing: Callable[[], None]) -> None:
        self._part, self._landing = part, landing
        self._behind: Callable[..., Any] | None = None
        self._waiting: set[int] = set()

    def wait(self, number: int) -> None:
        """A bucket is on its way."""
        self._waiting.add(number)
        present = self._part._compiled_call_impl
        if present is not self:
            self._behind = present
            self._put(self)

    def go(self, number: int) -> None:
        """It is there."""
        self._waiting.discard(number)
        if not self._waiting and self._part._compiled_call_impl is self:
            self._put(self._behind)

    def _put(self, call: Callable[..., Any] | None) -> None:
        self._part.__dict__["_compiled_call_impl"] = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Waits, and calls the module."""
        self._landing()
        if self._part._compiled_call_impl is self:
            self._put(self._behind)
        return self._part(*args, **kwargs)


def _waiting(
    module: nn.Module, seen: set[int]
) -> Iterator[tuple[nn.Module, Iterable[nn.Parameter]]]:
    """Modules that wait when they are called, each once, with what for."""
    if id(module) in seen:
        return
    seen.add(id(module))
    own = module._parameters
    if _compiles(module) or "_orig_mod" in module._modules or not isinstance(own, dict):
        yield module, module.parameters()  # as a whole; a ScriptModule has no dictionaries
        return
    if own:
        yield module, [parameter for parameter in own.values() if parameter is not None]
    for child in module._modules.values():
        if child is not None:
            yield from _waiting(child, seen)


def _compiles(module: nn.Module) -> bool:
    """Whether `module.compile()` has been called."""
    return module._compiled_call_impl is not None


_OPEN: weakref.WeakSet[Publishing] = weakref.WeakSet()
"""Of this process."""


def _land_all() -> None:
    for publishing in list(_OPEN):
        with suppress(CommError):  # raised again where the values are asked for
            publishing.land()


# A process that is forked (a loader's worker) has copies of parameters, but nobody who brings them;
# and when the interpreter ends, peers may still wait for what this rank sends.
os.register_at_fork(before=_land_all)
atexit.register(_land_all)
