"""The import finder for `deepspeed` and everything below it, and its entry among the installed
distributions.

Modules are made of the table in `zerort.compat.deepspeed.names` when they are imported; one that is
not in the table is empty. What a module has no name for is a placeholder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from zerort_as_deepspeed.version import VERSION

__all__ = ["Finder", "Refusal", "spec_of"]

_ROOT = "deepspeed"

_NEVER = ("__", "_repr_", "_ipython_")
"""What Python and notebooks ask every object for."""


class Finder(metadata.DistributionFinder):
    """First on `sys.meta_path`."""

    answers_for_deepspeed = True

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """A spec for `deepspeed` and what is below it, whether it is in the table or not."""
        if fullname != _ROOT and not fullname.startswith(f"{_ROOT}."):
            return None
        return spec_of(fullname)

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        """The distribution `deepspeed`, for those who ask for it or for all."""
        name = None if context is None else context.name
        return [_Distribution()] if name is None or name.lower() == _ROOT else []

    def invalidate_caches(self) -> None:
        """Nothing is cached."""


class Refusal(MetaPathFinder):
    """First on `sys.meta_path`: to import deepspeed raises."""

    answers_for_deepspeed = True

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Raises `ImportError` for deepspeed."""
        if fullname == _ROOT:
            raise ImportError(self.reason, name=_ROOT)


def spec_of(name: str) -> ModuleSpec:
    """A spec for a module by DeepSpeed's name."""
    return ModuleSpec(name, _Loader(), origin=__file__, is_package=True)


class _Distribution(metadata.Distribution):
    _FILES: Mapping[str, str] = {
        "METADATA": f"Metadata-Version: 2.1\nName: {_ROOT}\nVersion: {VERSION}\n"
        "Summary: zerort, by DeepSpeed's name\n",
        "top_level.txt": f"{_ROOT}\n",
        "INSTALLER": "zerort\n",
    }

    def read_text(self, filename: str) -> str | None:
        return self._FILES.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Module(ModuleType):
    """A module by DeepSpeed's name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_NEVER):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name)
        names = _table()
        inner = f"{self.__name__}.{name}"
        if inner in names.MODULES:
            return importlib.import_module(inner)
        further = names.FURTHER.get(self.__name__)
        if further is not None and hasattr(further, name):
            return getattr(further, name)
        return names.placeholder(inner)

    def __dir__(self) -> Iterator[str]:
        prefix = f"{self.__name__}."
        below = (name[len(prefix) :] for name in _table().MODULES if name.startswith(prefix))
        return iter({*super().__dir__(), *(name for name in below if "." not in name)})


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = __file__
        module.__dict__["stands_for_zerort"] = True
        module.__dict__.update(_table().MODULES.get(module.__name__, {}))


def _table() -> ModuleType:
    """The names; made when the first module is imported, not when the finder is installed."""
    name = "zerort.compat.deepspeed.names"
    return sys.modules.get(name) or importlib.import_module(name)
