"""`install`: from then on `import deepspeed` finds zerort."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from zerort.compat.deepspeed.finder import Finder
from zerort.errors import ConfigError
from zerort.installed import VARIABLE, find_deepspeed, wish

__all__ = ["install", "is_installed"]

_LOOKED: Mapping[str, Callable[[ModuleType], bool]] = {
    "accelerate.accelerator": lambda module: not hasattr(module, "DummyOptim"),
    "transformers.integrations.deepspeed": lambda module: (
        getattr(module, "DeepSpeedConfig", None) is object
    ),
}
"""Modules that look for DeepSpeed once, when they are imported: what one without it is like."""


def install(shadow: bool | None = None) -> None:
    """Lets `import deepspeed`, and who asks for its version, find zerort. A second call does
    nothing.

    Call it before transformers, TRL or anything else that looks for DeepSpeed is imported. A
    DeepSpeed that is installed is hidden in this process where `shadow` is true (by default: where
    the variable ZERORT_AS_DEEPSPEED is "shadow"), never changed. Raises `ConfigError` where one is
    installed and may not be hidden, where one has been imported already, and where transformers
    has looked already and found none.
    """
    if is_installed():
        return
    shadow = wish().shadow if shadow is None else shadow
    _refuse_imported()
    found = find_deepspeed()
    if found is not None and not found.stands_in and not shadow:
        raise ConfigError(
            f"a DeepSpeed is installed ({found.version or 'without metadata'}, {found.place}), and "
            "would be hidden from this process: uninstall it, or say that it may be hidden by "
            f"install(shadow=True) or by {VARIABLE}=shadow"
        )
    for finder in [f for f in sys.meta_path if getattr(f, "answers_for_deepspeed", False)]:
        sys.meta_path.remove(finder)  # the one that waits for the first import
    sys.meta_path.insert(0, Finder())


def is_installed() -> bool:
    """Whether `install` was called in this process."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def _refuse_imported() -> None:
    there = sys.modules.get("deepspeed")
    if there is not None and not hasattr(there, "stands_for_zerort"):
        raise ConfigError(
            f"deepspeed is imported already, from {getattr(there, '__file__', None)}: call "
            "install() before anything that imports it, first thing in the script"
        )
    for name, lacks in _LOOKED.items():
        module = sys.modules.get(name)
        if module is not None and lacks(module):
            raise ConfigError(
                f"{name} was imported before, has found no deepspeed, and will not look again: "
                "call install() first thing in the script, or start it with "
                "`python -m zerort.compat.run`"
            )
