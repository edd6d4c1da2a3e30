"""Autograd hooks: each turns an event of autograd's into one integer for the core. No arithmetic,
no tensors kept.

There are two kinds on parameters. A *post-accumulate-grad hook* finds `.grad` complete: a
sentinel's, or every parameter's. While a pass only observes, *tensor pre-hooks* do, which run
before the gradient is accumulated and can be taken off without a trace. Once a parameter has had a
post-accumulate-grad hook, torch (as of 2.15) crosses into Python for it in every later backward,
whether there still is a hook to call or not, and that crossing is nearly all that a hook costs.

A hook is a function of its own over an integer and two callables, never a bound method: a deepcopy
of the model must not copy the engine. Hooks return None and never block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zerort import _core
from zerort.grads.compiled import plain, shield
from zerort.run.executor import Executor

__all__ = ["ParameterHooks", "plain_hook", "tensors_in", "when_backward_reaches"]

Hook = Callable[[Tensor], None]
Ready = Callable[[int], int | None]
Dispatch = Callable[[int, int], None]
"""Takes a parameter and the `hi` that its gradient brought."""


class ParameterHooks:
    """The hooks on a model's parameters; a parameter has at most one."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        reducer: _core.Reducer,
        executor: Executor,
        dispatch: Dispatch,
    ) -> None:
        self._params = params
        self._make = (
            _timed_hook
            if executor.watch.times_gradients
            else plain_hook
            if executor.device.blocks
            else _stream_hook
        )
        self._reducer = reducer
        self._executor = executor
        self._dispatch = dispatch
        self._wrap = plain
        self._wanted: list[int] = []
        self._post: dict[int, Any] = {}
        self._pre: dict[int, Any] = {}

    def attach(self, wanted: list[int]) -> None:
        """From now on exactly `wanted` have a post-accumulate-grad hook; torch refuses to hook a
        frozen parameter.
        """
        self.relieve()
        if wanted == self._wanted:
            return
        for index in self._post.keys() - set(wanted):
            self._post.pop(index).remove()
        for index in wanted:
            if index not in self._post:
                hook = self._wrap(self._make(index, self._reducer, self._executor, self._dispatch))
                self._post[index] = self._params[index].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._wanted = wanted

    def observe(self, wanted: list[int]) -> None:
        """Until `relieve`, `wanted` have a tensor pre-hook, unless all of them have a
        post-accumulate-grad hook already.
        """
        if wanted == self._wanted:
            return
        self.attach([])
        for index in wanted:
            hook = self._wrap(_observing_hook(index, self._reducer))
            self._pre[index] = self._params[index].register_hook(hook)  # type: ignore[no-untyped-call]

    def relieve(self) -> None:
        """Takes the hooks of `observe` off."""
        for index, handle in self._pre.items():
            handle.remove()
            parameter = self._params[index]
            if not parameter._backward_hooks:
                parameter._backward_hooks = (
                    None  # an empty dictionary of hooks is still crossed for
                )
        self._pre.clear()

    def shield(self) -> None:
        """From now on no hook is traced by compiled autograd; those that are there are made
        anew.
        """
        wanted, self._wrap = self._wanted, shield
        self.attach([])
        self.attach(wanted)

    def remove(self) -> None:
        """Takes all hooks off."""
        self.attach([])


# Defaults instead of a closure's cells: in a backward over thousands of parameters every hook is
# met cold, and what it needs then lies in one tuple. It is a sixth of what a hook costs.


def plain_hook(index: int, reducer: _core.Reducer, _: Executor | None, dispatch: Dispatch) -> Hook:
    """The hook of an ordinary run on CPU."""

    def hook(
        _: Tensor,
        index: int = index,
        ready: Ready = reducer.grad_ready,
        dispatch: Dispatch = dispatch,
    ) -> None:
        hi = ready(index)
        if hi is not None:
            dispatch(index, hi)

    return hook


def _observing_hook(index: int, reducer: _core.Reducer) -> Hook:
    """Nothing leaves in a pass that observes, so the gradient need not be accumulated yet."""

    def hook(_: Tensor, index: int = index, ready: Ready = reducer.grad_ready) -> None:
        ready(index)

    return hook


def _stream_hook(
    index: int, reducer: _core.Reducer, executor: Executor, dispatch: Dispatch
) -> Hook:
    ready, produced = reducer.grad_ready, executor.streams.produced

    def hook(
        _: Tensor, index: int = index, ready: Ready = ready, dispatch: Dispatch = dispatch
    ) -> None:
        produced()
        hi = ready(index)
        if hi is not None:
            dispatch(index, hi)

    return hook


def _timed_hook(index: int, reducer: _core.Reducer, executor: Executor, dispatch: Dispatch) -> Hook:
    ready, produced, now = reducer.grad_ready_at, executor.streams.produced, time.perf_counter_ns

    def hook(_: Tensor) -> None:
        produced()
        hi = ready(index, now())
        if hi is not None:
            dispatch(index, hi)

    return hook


def when_backward_reaches(outputs: Any, begin: Callable[[], None]) -> None:
    """Calls `begin` once in each backward that reaches a tensor within `outputs`, before the
    module's part.
    """
    reached = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    if reached:
        torch.autograd.graph.register_multi_grad_hook(reached, lambda _: begin(), mode="any")


_PLAIN = (str, bytes, int, float, complex, type(None), type, nn.Module)
"""What no tensor that was just computed hides in."""

_MOST = 1000
"""Objects to look into; what is hidden deeper is found by its gradients."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors within containers of any kind: torch's pytrees, mappings, sequences, and objects
    by their attributes, such as dataclasses. Gives up in an object of very many parts, or that
    raises when it is looked into.
    """
    seen: set[int] = set()
    waiting = _leaves(value)
    while waiting and len(seen) < _MOST:
        found = waiting.pop()
        if isinstance(found, Tensor):
            yield found
        elif not isinstance(found, _PLAIN) and id(found) not in seen:
            seen.add(id(found))
            waiting.extend(leaf for part in _parts(found) for leaf in _leaves(part))


def _leaves(value: Any) -> list[Any]:
    try:
        return tree_leaves(value)
    except Exception:  # a class of the user's, or a list within itself
        return [value]


def _parts(value: Any) -> list[Any]:
    parts: list[Any] = []
    for held in (_items(value), _attributes(value)):
        with suppress(Exception):  # a class of the user's
            for part in islice(held, _MOST):
                parts.append(part)
    return parts


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, Sequence | Set):
        yield from value


def _attributes(value: Any) -> Iterator[Any]:
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        yield from (getattr(value, name) for name in names if hasattr(value, name))
