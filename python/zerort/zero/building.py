"""Which modules are complete while a model is built.

A module is complete when its constructor is on no frame of the stack any more; its parameters can
be sharded then. torch calls a hook for every parameter and every child that a module registers, so
no `__init__` is patched.

What it does not do: it looks at no values. Another thread's modules are its own.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ["Building"]


@dataclass
class Building:
    """Calls `complete(module, made_here)` for each module that becomes complete, where
    `made_here(parameter)` tells whether a parameter was registered since this began. A child that
    is not `pending` has been complete before.
    """

    complete: Callable[[nn.Module, Callable[[nn.Parameter], bool]], None]
    pending: Callable[[nn.Module], bool]
    _open: dict[int, nn.Module] = field(default_factory=dict)
    _seen: dict[int, weakref.ref[nn.Parameter]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _thread: int = 0

    def begin(self) -> None:
        """Listens from now on, to this thread."""
        self._thread = threading.get_ident()
        self._handles = [
            register_module_parameter_registration_hook(self._parameter),
            register_module_module_registration_hook(self._module),
        ]

    def end(self, *, completes: bool) -> None:
        """Listens no longer. What is left is complete, if it `completes`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        left, self._open = self._open, {}
        for module in left.values() if completes else ():
            self.complete(module, self._made_here)
        self._seen.clear()

    def look(self) -> None:
        """Hands on what is complete."""
        running = _under_construction()
        done = [module for key, module in self._open.items() if key not in running]
        self._open = {key: module for key, module in self._open.items() if key in running}
        for module in done:
            self.complete(module, self._made_here)

    def _parameter(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if threading.get_ident() == self._thread:
            self.look()
            self._seen[id(parameter)] = weakref.ref(parameter)
            self._open[id(module)] = module

    def _module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        # A child may have come without registering anything, as copies do.
        if threading.get_ident() == self._thread and child is not None:
            self.look()
            for part in child.modules():
                if part._parameters and self.pending(part):
                    self._open[id(part)] = part

    def _made_here(self, parameter: nn.Parameter) -> bool:
        seen = self._seen.get(id(parameter))
        return seen is not None and seen() is parameter


def _under_construction() -> set[int]:
    """Ids of the objects whose `__init__` is on the stack."""
    found = set()
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            found.add(id(frame.f_locals.get(code.co_varnames[0])))
        frame = frame.f_back  # type: ignore[assignment]
    return found
