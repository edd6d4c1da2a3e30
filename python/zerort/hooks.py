"""Autograd hooks: each turns an event of autograd's into one integer for the core. No arithmetic, no tensors kept.

A hook is a function of its own over an integer and two callables, never a bound method: a deepcopy of the model must
not copy the engine. Hooks return None and never block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zerort import _core
from zerort.executor import Executor

__all__ = ["ParameterHooks", "after_backward", "plain_hook", "when_backward_reaches"]

Hook = Callable[[Tensor], None]
Ready = Callable[[int], int | None]
Go = Callable[[int, int], None]
"""Told a parameter and the `hi` that its gradient brought."""


class ParameterHooks:
    """One post-accumulate hook per parameter that requires grad."""

    def __init__(self, params: Sequence[nn.Parameter], reducer: _core.Reducer, executor: Executor, go: Go) -> None:
        on_cuda = any(parameter.device.type == "cuda" for parameter in params)
        self._params = params
        self._make = _timed_hook if executor.watch.enabled else _stream_hook if on_cuda else plain_hook
        self._reducer = reducer
        self._executor = executor
        self._go = go
        self._handles: dict[int, Any] = {}

    def attach(self, active: Sequence[bool]) -> None:
        """Hooks parameters that require grad and have no hook yet; torch refuses to hook a frozen one."""
        for index, wanted in enumerate(active):
            if wanted and index not in self._handles:
                hook = self._make(index, self._reducer, self._executor, self._go)
                self._handles[index] = self._params[index].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Takes all hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


# Defaults instead of a closure's cells: in a backward over thousands of parameters every hook is met cold, and what it
# needs then lies in one tuple. It is a sixth of what a hook costs.


def plain_hook(index: int, reducer: _core.Reducer, _: Executor | None, go: Go) -> Hook:
    """The hook of an ordinary run on CPU."""

    def hook(_: Tensor, index: int = index, ready: Ready = reducer.grad_ready, go: Go = go) -> None:
        hi = ready(index)
        if hi is not None:
            go(index, hi)

    return hook


def _stream_hook(index: int, reducer: _core.Reducer, executor: Executor, go: Go) -> Hook:
    ready, produced = reducer.grad_ready, executor.streams.produced

    def hook(_: Tensor, index: int = index, ready: Ready = ready, go: Go = go) -> None:
        produced()
        hi = ready(index)
        if hi is not None:
            go(index, hi)

    return hook


def _timed_hook(index: int, reducer: _core.Reducer, executor: Executor, go: Go) -> Hook:
    ready, produced, now = reducer.grad_ready_at, executor.streams.produced, time.perf_counter_ns

    def hook(_: Tensor) -> None:
        produced()
        hi = ready(index, now())
        if hi is not None:
            go(index, hi)

    return hook


def when_backward_reaches(outputs: Any, begin: Callable[[], None]) -> None:
    """Calls `begin` once in each backward that reaches a tensor within `outputs`, before the module's part."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if leaves:
        torch.autograd.graph.register_multi_grad_hook(leaves, lambda _: begin(), mode="any")


def after_backward(finish: Callable[[], None]) -> None:
    """Calls `finish` when the backward under way is over. Only from within a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(finish)
