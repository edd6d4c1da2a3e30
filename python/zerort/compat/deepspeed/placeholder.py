"""A name of DeepSpeed's that zerort has no answer for. To import it, to test instances for it and
to derive from it do nothing; to use it raises with its dotted name.

It is a class, because most such names are: `isinstance(x, PipelineModule)` is False then, and a
class of the user's own that derives from it raises when it is made an instance of. One name has one
placeholder, which can be pickled.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any, NoReturn

from zerort.errors import NotBuiltError

__all__ = ["placeholder"]


class _Kind(type):
    """Of the placeholders."""

    _dotted: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(cls._dotted)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith(("__", "_repr_", "_ipython_")):
            raise AttributeError(f"{cls._dotted} has no attribute {name!r}", name=name)
        return placeholder(f"{cls._dotted}.{name}")

    def __repr__(cls) -> str:
        return f"<{cls._dotted}, which zerort does not have>"

    def __bool__(cls) -> bool:
        return True  # as a class is, not by its length


@cache
def placeholder(dotted: str) -> Any:
    """What stands for `dotted`."""
    last = dotted.rpartition(".")[2]
    base = Exception if last.endswith(("Error", "Exception")) else object
    return _Kind(last, (base,), {"_dotted": dotted, "__module__": dotted.rpartition(".")[0]})


def _refuse(dotted: str) -> NoReturn:
    raise NotBuiltError(
        f"{dotted} is DeepSpeed's and zerort has nothing in its place: see docs/migration.md for "
        "what there is, and leave it out"
    )


def _used(cls: Any, *args: Any) -> NoReturn:
    _refuse(cls._dotted)


for _name in ("enter", "exit", "iter", "len", "getitem", "contains", "int", "float"):
    setattr(_Kind, f"__{_name}__", _used)


def _reduced(cls: Any) -> Any:
    return (placeholder, (cls._dotted,)) if "_dotted" in vars(cls) else cls.__qualname__


copyreg.pickle(_Kind, _reduced)
