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
from contextlib import AbstractContextManager
from enum import Enum, auto
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zerort.errors import StepError
from zerort.memory import version_of
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


class Keeper(Protocol):
    """Who gathers a parameter's values."""

    def use(self, params: Sequence[nn.Parameter], call: Callable[[], Any]) -> Any:
        """Runs `call`, which reads the values of `params` although none of their modules does.

        Raises `StepError` naming a parameter where there is no pass that could gather them.
        """

    def write(self, access: Writing, call: Callable[[], Any]) -> Any:
        """Runs `call`, which writes parameters in place. Raises `StepError` where that would be
        lost.
        """

    def detached(self, parameter: nn.Parameter) -> Tensor | None:
        """What stands for the values where they are not to be read now; None where `use` is to
        decide.
        """

    def copied(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """A copy, sharded as well; None where there can be none."""

    def hold(
        self, params: Sequence[nn.Parameter], modifier: int | None
    ) -> AbstractContextManager[None]:
        """Within, `params` are whole and themselves; all ranks enter and leave together. With
        `modifier`, what that rank wrote is everybody's value behind it.
        """


class Writing(NamedTuple):
    """An operation that writes parameters in place."""

    what: str
    """Its name."""
    written: Sequence[nn.Parameter]
    params: Sequence[nn.Parameter]
    """All of the same keeper's that it touches, the written among them."""


class Home(NamedTuple):
    """Where a parameter belongs."""

    keeper: Keeper
    name: str
    kind: type[nn.Parameter]
    """Its class while its values are there."""


class ZeroParamStatus(Enum):
    """What `ds_status` says of a sharded parameter; DeepSpeed's. One whose values are there has no
    such attribute.
    """

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


_homes: dict[int, Home] = {}
"""By the parameter's id, between `enter` and `leave`."""


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
        match _access(func):
            case Access.GRAPH:
                return _through(func, args, kwargs)
            case Access.METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            case Access.DETACH:
                if sys._getframe(1).f_code is _MAKES_PARAMETERS:
                    return _copy(args[0], "nn.Parameter(...)")
                home = _homes[id(args[0])]
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
            home = _homes.get(id(self))
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
    copied = _homes[id(parameter)].keeper.copied(parameter)
    if copied is None:
        raise StepError(_escape(what, (parameter,), {}))
    return copied


class Access(Enum):
    """What a torch function wants of a parameter."""

    METADATA = auto()
    GRAPH = auto()
    """A place in the graph: a backward up to it."""
    DETACH = auto()
    """The values without their history, which a state dict asks for."""
    READ = auto()
    WRITE = auto()
    ESCAPE = auto()
    """The values in a form that torch does not see any more."""


_VALUES = frozenset({"T", "H", "mT", "mH", "real", "imag"})
_METADATA = frozenset(
    """
    __dir__ __format__ __hash__ __len__ _is_view _is_zerotensor can_cast dim element_size empty_like
    full_like get_device has_names is_complex is_conj is_contiguous is_distributed is_floating_point
    is_inference is_neg is_same_size is_signed is_tensor ndimension nelement
    new_empty new_empty_strided new_full new_ones new_tensor new_zeros numel ones_like rand_like
    randint_like randn_like register_hook register_post_accumulate_grad_hook requires_grad_
    result_type retain_grad size sparse_dim storage_offset stride untyped_storage zeros_like
    """.split()  # noqa: SIM905
)
_ESCAPES = frozenset(
    """
    __array__ __array_wrap__ __dlpack__ __dlpack_device__ _typed_storage data_ptr numpy resize_
    resize_as_ set_ share_memory_ storage to_dlpack tolist
    """.split()  # noqa: SIM905
)


_AUGMENTED = frozenset(
    """
    __iadd__ __iand__ __ifloordiv__ __imatmul__ __imod__ __imul__ __ior__ __ipow__ __isub__
    __itruediv__ __ixor__ __setitem__
    """.split()  # noqa: SIM905
)


@lru_cache(maxsize=4096)
def _access(func: Callable[..., Any]) -> Access:
    """What `func` is, by its name; one that is not known reads."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return _access_to(getattr(getattr(func, "__self__", None), "__name__", ""), name)
    if name in _METADATA:
        return Access.METADATA
    if name in _ESCAPES:
        return Access.ESCAPE
    if name in ("detach", "detach_"):
        return Access.DETACH
    if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
        return Access.GRAPH
    in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("_foreach_"))
    return Access.WRITE if in_place or name in _AUGMENTED else Access.READ


def _access_to(attribute: str, how: str) -> Access:
    if attribute == "data":
        return Access.DETACH if how == "__get__" else Access.WRITE
    if attribute == "__cuda_array_interface__":
        return Access.ESCAPE
    return Access.READ if attribute in _VALUES else Access.METADATA


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
        own = [parameter for parameter in changed if _homes[id(parameter)].keeper is keeper]
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
        keeper = _homes[id(parameter)].keeper
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
    homes = [_homes.get(id(parameter)) for parameter in _sharded_in((args, kwargs))]
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
    home = _homes[id(parameter)] = Home(keeper, name, type(parameter))
    return home


class Gone(Sharded):
    """A parameter whose values went with the engine that had them. Metadata is answered."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _access(func) is Access.METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise StepError(
            f"{_name(func)} of a parameter of shape {next(_shapes(args, kwargs))}, whose values "
            "went with its engine, which has been destroyed or collected: copy them before, inside "
            "zerort.zero.GatheredParameters(parameters), or build the model anew and load a "
            "checkpoint"
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
    home = _homes.pop(id(parameter), None)
    if home is not None:
        parameter.__class__ = home.kind


def lose(parameter: nn.Parameter) -> None:
    """No keeper has the parameter any more: it is itself if its values are there, else they
    are gone.
    """
    home = _homes.pop(id(parameter), None)
    if home is None:
        return
    with torch._C.DisableTorchFunctionSubclass():
        is_there = parameter.untyped_storage().nbytes() > 0 or not parameter.numel()
    parameter.__class__ = home.kind if is_there else _gone(home.kind)


def forget(key: int) -> None:
    """The parameter of this id is no more."""
    _homes.pop(key, None)


def kind_of(parameter: nn.Parameter) -> type[nn.Parameter]:
    """Its class while its values are there."""
    return _homes[id(parameter)].kind


def expose(parameter: nn.Parameter) -> None:
    """The values are there: the parameter is itself."""
    parameter.__class__ = _homes[id(parameter)].kind


def conceal(parameter: nn.Parameter) -> None:
    """The values are not to be read any more."""
    parameter.__class__ = guarded(_homes[id(parameter)].kind)


def keeper_of(parameter: Tensor) -> Keeper | None:
    """Who gathers the parameter's values; None where they are whole for good."""
    home = _homes.get(id(parameter))
    return None if home is None else home.keeper


def meta_like(parameter: Tensor) -> Tensor:
    """A tensor of the parameter's shape, strides and dtype without values."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
        )


def name_of(parameter: nn.Parameter) -> str:
    """Under which it was registered when it was sharded."""
    home = _homes.get(id(parameter))
    return "?" if home is None else home.name
