"""Leaf modules: subtrees whose parameters are needed together.

A module that is marked is one stop: when it is called, everything below it is gathered at once, and
the modules inside ask for nothing. That suits experts that are chosen anew for every batch, and
trees of very small modules. A mark is an attribute of the module, and counts at `initialize`; below
stage 3 it means nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from zerort.config import Config
from zerort.errors import ConfigError

__all__ = [
    "get_z3_leaf_modules",
    "mark_configured",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
]

_log = logging.getLogger("zerort")

_MARK = "_z3_leaf"


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this very module is marked."""
    return bool(getattr(model, _MARK, False))


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Marks this very module, or takes its mark away."""
    setattr(model, _MARK, flag)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules of a model, itself included."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: Sequence[type | str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Marks every module of these classes, which are given as classes, names or dotted names.

    Returns the modules. Call it before `initialize`. Raises `ConfigError` where none is of them,
    unless told not to. Mirrors deepspeed.utils.set_z3_leaf_modules.
    """
    return _mark_classes(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: Sequence[type | str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Takes the mark away from every module of these classes, and returns them."""
    return _mark_classes(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module,
    module_names: Sequence[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Marks modules by their names in `named_modules()`. Returns them, and the names that are
    none's; raises `ConfigError` for those unless told not to.
    """
    return _mark_named(
        model, module_names, lambda name, wanted: name == wanted, flag, raise_if_not_found
    )


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: Sequence[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Like `set_z3_leaf_modules_by_name`, by how the names end."""
    return _mark_named(model, module_name_suffixes, str.endswith, flag, raise_if_not_found)


def mark_configured(model: nn.Module, settings: Config) -> None:
    """Marks what `leaf_module` of the configuration names. What is not found is logged."""
    leaves = settings.zero_optimization.leaf_module
    missing = [name for name in leaves.classes if not set_z3_leaf_modules(model, [name], False)]
    missing += set_z3_leaf_modules_by_name(model, leaves.names, raise_if_not_found=False)[1]
    missing += set_z3_leaf_modules_by_suffix(model, leaves.name_suffixes, raise_if_not_found=False)[
        1
    ]
    if missing:
        _log.warning("leaf_module: no module of the model is %s", " or ".join(missing))


def _mark_classes(
    model: nn.Module, classes: Iterable[type | str], flag: bool, raises: bool
) -> list[nn.Module]:
    wanted = list(classes)
    found = [module for module in model.modules() if any(_is_of(module, kind) for kind in wanted)]
    if raises and not found:
        listed = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in wanted)
        raise ConfigError(f"no module of {type(model).__name__} is of the classes {listed}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _is_of(module: nn.Module, kind: type | str) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    own = type(module)
    return kind in (own.__name__, f"{own.__module__}.{own.__qualname__}")


def _mark_named(
    model: nn.Module,
    names: Sequence[str],
    fits: Callable[[str, str], bool],
    flag: bool,
    raises: bool,
) -> tuple[list[nn.Module], list[str]]:
    modules = list(model.named_modules())
    found: dict[int, nn.Module] = {}
    missing = []
    for wanted in names:
        fitting = [module for name, module in modules if fits(name, wanted)]
        if not fitting:
            missing.append(wanted)
        found |= {id(module): module for module in fitting}
    if raises and missing:
        raise ConfigError(f"no module of {type(model).__name__} is called {', '.join(missing)}")
    for module in found.values():
        set_z3_leaf_module(module, flag)
    return list(found.values()), missing
