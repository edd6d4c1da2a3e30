"""A parameter whose values are elsewhere.

Outside its own module's call a parameter of stage 3 has the class `Sharded`, mixed into the class
that it was made with. It is the same object, with the same shape, strides, dtype and hooks; what
reads or writes its values comes here first, by torch's `__torch_function__`. What only asks for
metadata is answered as ever.

What this guarantees: memory that has been given back is not read, as far as torch's functions are
concerned. A C extension that takes the address, or an alias of the memory that was taken while the
values were there, is not seen. What it does not do: it decides nothing about when values are
gathered; it asks the parameter's `Keeper`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from zerort.errors import StepError
from zerort.memory import version_of
from zerort.params.access import Access, access_of
from zerort.params.homes import (
    HOMES,
    Home,
    Keeper,
    Writing,
    forget,
    keeper_of,
    kind_of,
    meta_like,
    name_of,
)
from zerort.run.changes import lost

__all__ = [
    "Gone",
    "Home",
    "Keeper",
    "Sharded",
    "Writing",
    "ZeroParamStatus",
    "conceal",
    "enter",
    "expose",
    "forget",
    "guarded",
    "keeper_of",
    "kind_of",
    "leave",
    "lose",
    "meta_like",
    "name_of",
]


class ZeroParamStatus(Enum):
    """What `ds_status` says of a parameter; DeepSpeed's. One that is whole, and has ever been
    sharded, has it as an attribute.
    """

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Sharded(nn.Parameter):
    """Mixed into a parameter's own class; see the module."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        match access_of(func):
            case Access.GRAPH:
                return _through(func, args, kwargs)
            case Access.METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            case Access.DETACH:
                if sys._getframe(1).f_code is _MAKES_PARAMETERS:
                    return _copy(args[0], "nn.Parameter(...)")
                home = HOMES[id(args[0])]
                stands = home.keeper.detached(args[0])
                return _use(func, args, kwargs, written=()) if stands is None else stands
            case Access.READ:
                return _use(func, args, kwargs, written=kwargs.get("out"))
            case Access.WRITE:
                # torch.nn.init hands its tensor on by name
                return _use(func, args, kwargs, written=args[:1] or kwargs.get("tensor"))
            case Access.ESCAPE:
                raise StepError(_escape(_name(func), args, kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            home = HOMES.get(id(self))
            named = "" if home is None else f"{home.name}, "
            return (
                f"Parameter({named}shape={tuple(self.shape)}, dtype={self.dtype}, "
                f"device={self.device}, sharded)"
            )

    # torch asks the memory itself, which is not here.

    def is_shared(self) -> bool:
        """Not with another process."""
        return False

    def is_pinned(self, device: Any = None) -> bool:
        """Not page-locked."""
        return False

    # What DeepSpeed's parameters of stage 3 have, and integrations ask for.

    @property
    def ds_numel(self) -> int:
        """Elements of the whole parameter."""
        return self.numel()

    @property
    def ds_shape(self) -> torch.Size:
        """Of the whole parameter."""
        return self.shape

    @property
    def ds_id(self) -> int:
        """A number that no other parameter has."""
        return id(self)

    @property
    def ds_status(self) -> ZeroParamStatus:
        """Its values are not here."""
        return ZeroParamStatus.NOT_AVAILABLE

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = _copy(self, "copy.deepcopy")
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StepError(_escape("pickle", (self,), {}))


_MAKES_PARAMETERS = nn.Parameter.__new__.__code__
"""It asks a tensor of a class of its own for `detach()`, and wants the same class back."""


def _copy(parameter: nn.Parameter, what: str) -> nn.Parameter:
    copied = HOMES[id(parameter)].keeper.copied(parameter)
    if copied is None:
        raise StepError(_escape(what, (parameter,), {}))
    return copied


def _through(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A backward up to parameters, which asks nothing of their values itself."""
    params = _sharded_in((args, kwargs))
    kinds = [type(parameter) for parameter in params]
    for parameter in params:
        expose(parameter)
    versions = list(map(version_of, params))
    try:
        result = func(*args, **kwargs)
        written = [p for p, old in zip(params, versions, strict=True) if version_of(p) != old]
    finally:
        for parameter, kind in zip(params, kinds, strict=True):
            parameter.__class__ = kind
    if written:
        raise StepError(lost(name_of(written[0])))
    return result


def _use(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], written: Any
) -> Any:
    """Lets the keeper gather what is sharded among the arguments around the call; `written` are
    those that it changes.
    """

    def call() -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    changed = _sharded_in(written)
    for keeper, params in _by_keeper((args, kwargs)):
        own = [parameter for parameter in changed if HOMES[id(parameter)].keeper is keeper]
        call = _within(keeper, params, own, _name(func), call)
    return call()


def _within(
    keeper: Keeper,
    params: Sequence[nn.Parameter],
    written: Sequence[nn.Parameter],
    what: str,
    call: Callable[[], Any],
) -> Callable[[], Any]:
    """`call`, with what is the keeper's gathered around it."""
    if written:
        return lambda: keeper.write(Writing(what, written, params), call)
    return lambda: keeper.use(params, call)


def _by_keeper(values: Any) -> list[tuple[Keeper, list[nn.Parameter]]]:
    """What is sharded among `values`, with who keeps it."""
    found: dict[int, tuple[Keeper, list[nn.Parameter]]] = {}
    for parameter in _sharded_in(values):
        keeper = HOMES[id(parameter)].keeper
        found.setdefault(id(keeper), (keeper, []))[1].append(parameter)
    return list(found.values())


def _sharded_in(values: Any) -> list[nn.Parameter]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Sharded)]


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__", "__delete__"):
        return f".{getattr(getattr(func, '__self__', None), '__name__', '')}"
    return name


def _escape(what: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    homes = [HOMES.get(id(parameter)) for parameter in _sharded_in((args, kwargs))]
    name = next((home.name for home in homes if home is not None), "?")
    return (
        f"parameter {name} is sharded, and {what} would hand out memory that is given back: copy "
        "the values inside zerort.zero.GatheredParameters(parameters)"
    )


@cache
def guarded(kind: type[nn.Parameter]) -> type[Sharded]:
    """`Sharded` mixed into `kind`, so that a parameter of a class of its own keeps its methods."""
    if kind is nn.Parameter:
        return Sharded
    return type(f"Sharded{kind.__name__}", (Sharded, kind), {})


def enter(parameter: nn.Parameter, keeper: Keeper, name: str) -> Home:
    """From now on `keeper` answers for the parameter's values while its class is `guarded`."""
    home = HOMES[id(parameter)] = Home(keeper, name, type(parameter))
    mark(parameter, stays_whole=False)
    return home


def mark(parameter: nn.Parameter, *, stays_whole: bool) -> None:
    """Lets it answer as DeepSpeed's do while it is whole, in a forward or for good."""
    # past the class of a sharded one, which has properties of these names
    parameter.__dict__.update(
        ds_status=ZeroParamStatus.AVAILABLE,
        ds_shape=parameter.shape,
        ds_numel=parameter.numel(),
        ds_id=id(parameter),
        ds_persist=stays_whole,
    )


class Gone(Sharded):
    """A parameter whose values went with an engine that had broken off in the middle of an update,
    so that shards of two states were left. Metadata is answered.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if access_of(func) is Access.METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise StepError(
            f"{_name(func)} of a parameter of shape {next(_shapes(args, kwargs))}, whose values "
            "went with its engine, which had broken off in the middle of an update: build the "
            "model anew and load a checkpoint"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone()


def _shapes(args: Sequence[Any], kwargs: dict[str, Any] | None) -> Iterator[tuple[int, ...]]:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Gone):
            yield tuple(leaf.shape)


@cache
def _gone(kind: type[nn.Parameter]) -> type[Gone]:
    return Gone if kind is nn.Parameter else type(f"Gone{kind.__name__}", (Gone, kind), {})


def leave(parameter: nn.Parameter) -> None:
    """The parameter is itself: its values are there, or another has them now."""
    home = HOMES.pop(id(parameter), None)
    if home is not None:
        parameter.__class__ = home.kind


def lose(parameter: nn.Parameter) -> None:
    """No keeper has the parameter any more: it is itself if its values are there, else they
    are gone.
    """
    home = HOMES.pop(id(parameter), None)
    if home is None:
        return
    with torch._C.DisableTorchFunctionSubclass():
        is_there = parameter.untyped_storage().nbytes() > 0 or not parameter.numel()
    parameter.__class__ = home.kind if is_there else _gone(home.kind)


def expose(parameter: nn.Parameter) -> None:
    """The values are there: the parameter is itself."""
    parameter.__class__ = HOMES[id(parameter)].kind


def conceal(parameter: nn.Parameter) -> None:
    """The values are not to be read any more."""
    parameter.__class__ = guarded(HOMES[id(parameter)].kind)
