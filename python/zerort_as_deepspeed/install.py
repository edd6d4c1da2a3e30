"""`install`: from then on `import deepspeed` finds zerort."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from zerort_as_deepspeed import VARIABLE, wanted
from zerort_as_deepspeed.finder import Finder, Refusal, spec_of
from zerort_as_deepspeed.installed import find_deepspeed

__all__ = ["Refused", "WouldHide", "install", "install_or_refuse", "is_installed", "take_place"]

_LOOKED: Mapping[str, Callable[[ModuleType], bool]] = {
    "accelerate.accelerator": lambda module: not hasattr(module, "DummyOptim"),
    "transformers.integrations.deepspeed": lambda module: (
        getattr(module, "DeepSpeedConfig", None) is object
    ),
}
"""Modules that look for DeepSpeed once, when they are imported: what one without it is like."""


class Refused(ValueError):
    """Why `import deepspeed` cannot be answered in this process."""


class WouldHide(Refused):
    """A DeepSpeed is installed, and may not be hidden."""


def install(shadow: bool | None = None) -> None:
    """Lets `import deepspeed`, and who asks for its version, find zerort. A second call does
    nothing.

    Call it before transformers, TRL or anything else that looks for DeepSpeed is imported. A
    DeepSpeed that is installed is hidden in this process where `shadow` is true (by default: where
    the variable ZERORT_AS_DEEPSPEED is "shadow"), never changed. Raises `Refused` where one is
    installed and may not be hidden, where one has been imported already, and where Accelerate or
    transformers has looked already and found none.
    """
    if is_installed():
        return
    shadow = wanted() == "shadow" if shadow is None else shadow
    _refuse_imported()
    found = find_deepspeed()
    if found is not None and not found.stands_in and not shadow:
        raise WouldHide(
            f"a DeepSpeed is installed ({found.version or 'without metadata'}, {found.place}), and "
            "would be hidden from this process: uninstall it, or say that it may be hidden by "
            f"install(shadow=True) or by {VARIABLE}=shadow"
        )
    sys.meta_path.insert(0, Finder())


def install_or_refuse() -> None:
    """`install` for a process that may never ask for deepspeed: where one is installed that may not
    be hidden, it is told so who imports it. Raises `Refused` for the other reasons.
    """
    try:
        install()
    except WouldHide as reason:
        sys.meta_path.insert(0, Refusal(str(reason)))


def is_installed() -> bool:
    """Whether `install` was called in this process."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def _refuse_imported() -> None:
    there = sys.modules.get("deepspeed")
    if there is not None and not hasattr(there, "stands_for_zerort"):
        raise Refused(
            f"deepspeed is imported already, from {getattr(there, '__file__', None)}: call "
            "install() before anything that imports it, first thing in the script"
        )
    for name, lacks in _LOOKED.items():
        module = sys.modules.get(name)
        if module is not None and lacks(module):
            raise Refused(
                f"{name} was imported before, has found no deepspeed, and will not look again: "
                "call install() first thing in the script, or start it with "
                "`python -m zerort.compat.run`"
            )


def take_place() -> None:
    """Called by the package `deepspeed` that stands for zerort, while it is imported: puts the
    module that answers in its place.
    """
    install()
    spec = spec_of("deepspeed")
    sys.modules["deepspeed"] = module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
