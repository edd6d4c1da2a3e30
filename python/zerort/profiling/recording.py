"""What a model's forward costs, by module: counted by torch's `FlopCounterMode`, credited to the
innermost module that is open, timed where modules open and close.

What is credited to a module is its own alone, and what it costs is its own and that of all modules
below it, each once: a module that stands in the tree twice is not counted twice, and a list of
layers, which is never called, costs what its layers do.

Hooks and the counter are there between `start` and `stop`, and nothing is replaced in torch. What
runs in a backward, on another thread or outside of the model is not counted. What torch.compile has
compiled runs uncompiled meanwhile: its kernels cannot be counted. The result of a forward is what
it is without all this.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from zerort.device import Device
from zerort.profiling.formulas import missing
from zerort.profiling.laps import Laps

__all__ = ["Recording"]


@dataclass
class _Open:
    """A module whose forward runs."""

    module: nn.Module
    since: Any
    """A moment of its device; None where the module is open further out already."""


class Recording:
    """Flops and seconds by module of `model`; modules of the classes `ignored` are part of what
    calls them.
    """

    def __init__(
        self, model: nn.Module, device: Device, ignored: Collection[type[nn.Module]] = ()
    ) -> None:
        self.model = model
        self._modules = [module for module in model.modules() if type(module) not in ignored]
        self._laps = Laps(device)
        self._flops: dict[int, int] = {}
        self._open: list[_Open] = []
        self._credited = 0
        self._thread = 0
        self._counter: Any = None
        self._held = ExitStack()

    def start(self) -> None:
        """Counts from here on, beside what has been counted before."""
        _prime()
        self._thread, self._credited = threading.get_ident(), 0
        with ExitStack() as held:
            for module in self._modules:
                held.callback(module.register_forward_pre_hook(self._enter).remove)
                hook = module.register_forward_hook(self._leave, always_call=True)
                held.callback(hook.remove)
            # This imports the compiler, whether anything is compiled or not: the first import runs
            # operations of its own, and the forward may be what imports it.
            held.enter_context(torch.compiler.set_stance("force_eager"))
            self._counter = held.enter_context(_counter())
            self._held = held.pop_all()

    def stop(self) -> None:
        """Takes everything off again; what was counted stays. Once is enough."""
        try:
            while self._open:
                self._close()
        finally:
            self._counter = None
            self._held.close()

    def reset(self) -> None:
        """Drops what has been counted."""
        self._credit()
        self._flops.clear()
        self._laps.clear()

    @contextmanager
    def within(self, module: nn.Module) -> Iterator[None]:
        """What runs within is `module`'s, whether its forward is what is called or not."""
        self._begin(module)
        try:
            yield
        finally:
            self._end(module)

    def flops(self, module: nn.Module) -> int:
        """Floating-point operations of `module` and all below it."""
        return sum(self._flops.get(id(part), 0) for part in module.modules())

    def seconds(self, module: nn.Module) -> float:
        """Time within `module`; of one that is never called, what its children took."""
        own = self._laps.seconds(id(module))
        return sum(map(self.seconds, module.children())) if own is None else own

    def _begin(self, module: nn.Module) -> None:
        self._credit()
        again = any(one.module is module for one in self._open)
        self._open.append(_Open(module, None if again else self._laps.now()))

    def _end(self, module: nn.Module) -> None:
        """What an exception has left open within ends as well."""
        if any(one.module is module for one in self._open):
            while self._close() is not module:
                pass

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if self._counts():
            self._begin(module)

    def _leave(self, module: nn.Module, _args: Any, _result: Any) -> None:
        if self._counts():
            self._end(module)

    def _counts(self) -> bool:
        # A backward runs forwards too, where activations are computed anew.
        ours = self._counter is not None and threading.get_ident() == self._thread
        return ours and torch._C._current_graph_task_id() == -1

    def _close(self) -> nn.Module:
        self._credit()
        last = self._open.pop()
        if last.since is not None:
            self._laps.add(id(last.module), last.since)
        return last.module

    def _credit(self) -> None:
        """What has been counted since the last time is the innermost module's."""
        total = self._counter.get_total_flops() if self._counter is not None else self._credited
        if self._open and total != self._credited:
            key = id(self._open[-1].module)
            self._flops[key] = self._flops.get(key, 0) + total - self._credited
        self._credited = total


class _Everywhere:
    """In place of torch's tracker of modules: they are known here, and it costs a fifth."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Everywhere:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _counter() -> Any:
    # Imported where it is used: it brings Triton along, a fifth of a second at every start.
    from torch.utils import flop_counter  # noqa: PLC0415

    options: dict[str, Any] = {}
    # Where torch knows this, an operator that it cannot count would not be run without it.
    if "skip_unsupported" in inspect.signature(flop_counter.FlopCounterMode).parameters:
        options["skip_unsupported"] = True
    counter: Any = flop_counter.FlopCounterMode(
        display=False, custom_mapping=missing(flop_counter.flop_registry), **options
    )
    counter.mod_tracker = _Everywhere()
    return counter


@cache
def _prime() -> None:
    """Torch imports what counting needs when the first operation is counted: more than a second,
    which would be that operation's.
    """
    with _counter():
        torch.zeros(1).relu()
