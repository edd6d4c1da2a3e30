"""A parameter whose new values are on their way.

Behind an update that is published beside the next forward a parameter has the class `Arriving`,
mixed into the class that it was made with, until its bucket is there. It is the same object; what
asks for its values by torch's functions comes here first, waits for the bucket, and goes on with
the parameter itself: nothing is refused, and a copy or a pickle is one of the plain class. What
asks for metadata alone is answered at once, and what is not known to does wait.

What it does not see: an alias of the memory that was taken before, and an extension that is given
the parameter and reads its memory without torch's functions.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from zerort.params.access import Access, access_of

__all__ = ["Arriving", "arriving", "forget", "land", "meet"]

Landing = Callable[[], None]
"""Waits for a parameter's bucket. Behind it the parameter is itself, unless it raises."""

_LANDINGS: dict[int, Landing] = {}
"""By the parameter's id, as long as an engine may publish it."""

_HANDS_OUT = frozenset(
    "__format__ full_like new_full new_tensor untyped_storage".split()  # noqa: SIM905
)
"""What metadata would do for where values are not there at all; here they may be read by it."""


class Arriving(nn.Parameter):
    """Mixed into a parameter's own class; see the module."""

    _kind: type[nn.Parameter] = nn.Parameter

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """One that is made of this class by its name is of the plain one."""
        return cls._kind(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _asks_for_values(func):
            found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Arriving)]
            for parameter in found:
                land(parameter)
            if sys._getframe(1).f_code is _MAKES_PARAMETERS:
                # it wants the class of what it detaches, which was this one when it asked
                return args[0].detach().as_subclass(type(args[0]))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        land(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        land(self)
        return self.__reduce_ex__(protocol)


_MAKES_PARAMETERS = nn.Parameter.__new__.__code__
Arriving.__torch_function__.__func__._torchdynamo_disable = True  # type: ignore[attr-defined]


def _asks_for_values(func: Callable[..., Any]) -> bool:
    return access_of(func) is not Access.METADATA or getattr(func, "__name__", "") in _HANDS_OUT


@cache
def arriving(kind: type[nn.Parameter]) -> type[Arriving]:
    """`Arriving` mixed into `kind`, so that a parameter of a class of its own keeps its methods."""
    if kind is nn.Parameter:
        return Arriving
    return type(f"Arriving{kind.__name__}", (Arriving, kind), {"_kind": kind})


def meet(parameter: nn.Parameter, landing: Landing) -> None:
    """From now on `landing` is asked when the parameter is `Arriving` and its values are wanted."""
    _LANDINGS[id(parameter)] = landing


def forget(parameter: nn.Parameter, landing: Landing) -> None:
    """It is not any more; nothing where another is by now."""
    if _LANDINGS.get(id(parameter)) is landing:
        del _LANDINGS[id(parameter)]


def land(parameter: nn.Parameter) -> None:
    """Waits until the parameter is itself. Raises `CommError`."""
    landing = _LANDINGS.get(id(parameter))
    if landing is not None:
        landing()
    cls = type(parameter)
    if issubclass(cls, Arriving):  # nobody is left who would bring anything
        parameter.__class__ = cls._kind
