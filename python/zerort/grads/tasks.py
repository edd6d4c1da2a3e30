"""Whose backward runs here, and how its loss was scaled.

autograd runs a backward as a *graph task* with a number of its own. From within one, this says
whether an engine began it, and by how much that engine had divided the loss. From outside, a
`GraphTask` says whether it still runs: a backward that raises calls no hook, but drops its
callbacks uncalled.

A backward that is run inside another one (reentrant activation checkpointing) is a graph task of
its own, and belongs to the one around it: both run on one thread. What is not told apart: two
threads of the caller's that run backwards on one accelerator at a time, whose graph tasks share
that device's thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zerort.errors import StepError
from zerort.grads.compiled import refuse_foreign, shield

__all__ = [
    "GraphTask",
    "LossScaling",
    "Running",
    "announce",
    "in_backward",
    "losses_here",
    "running_here",
]


class GraphTask:
    """The backward under way, as seen from one of its hooks; calls `ended` when it is over.

    `ended` is not called when the backward raises. Made only from within a backward.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self._alive = _queue(ended)

    @property
    def runs(self) -> bool:
        """Whether it is still under way, on whatever thread. False once it has raised."""
        return self._alive() is not None


@dataclass(frozen=True)
class LossScaling:
    """What an engine does to a loss before its backward: divides by `steps`, times `scale`.

    `steps` is None where the caller asked not to divide.
    """

    steps: int | None
    scale: float


@dataclass(eq=False)
class Running:
    """A backward that an engine knows of: `owner`'s, by a call of its own or over what its `scale`
    returned.
    """

    owner: object
    scaling: LossScaling
    by_call: bool
    task: int
    thread: int
    given: Tensor | None = None
    """The loss as the caller had it, until it is asked for."""


_running: weakref.WeakSet[Running] = weakref.WeakSet()
"""An entry lives as long as its graph task."""
_changing = threading.Lock()
"""Backwards on other threads come and go."""


def _known() -> list[Running]:
    with _changing:
        return list(_running)


def announce(
    loss: Tensor,
    owner: object,
    scaling: LossScaling,
    *,
    by_call: bool,
    compiles: bool = False,
    given: Tensor | None = None,
) -> Any:
    """In every backward of `loss`, `running_here` knows of `owner` and its `scaling`; `compiles`
    where it is a compiled one, `given` is for `losses_here`.

    Returns the handle that takes this back. The backward raises `StepError` where its loss has been
    scaled already.
    """

    def enter(_: Tensor) -> None:
        if not compiles:
            refuse_foreign()
        task = torch._C._current_graph_task_id()
        if any((known.by_call or by_call) and known.task == task for known in _known()):
            raise StepError(
                "engine.scale(loss) is for a loss.backward() of your own, and its loss would be "
                "scaled twice: call backward() on what scale returned, or give engine.backward "
                "the loss as it is"
            )
        _keep(Running(owner, scaling, by_call, task, threading.get_ident(), given))

    hook = shield(enter) if compiles else enter
    return loss.register_hook(hook)  # type: ignore[no-untyped-call]


def running_here(owner: object) -> Running | None:
    """The backward that the calling hook runs in, if an engine knows of it; `owner`'s view of it
    first.
    """
    return max(_around(), key=lambda each: (each.task, each.owner is owner), default=None)


def losses_here(owner: object) -> list[Tensor]:
    """The losses that the backward the caller runs in is of, where `owner` has scaled them; each is
    returned once.
    """
    mine = [each for each in _around() if each.owner is owner and each.given is not None]
    losses = [each.given for each in mine if each.given is not None]
    for each in mine:
        each.given = None
    return losses


def _around() -> list[Running]:
    """What engines know of the calling hook's backward, else of those that it runs within."""
    task, thread = torch._C._current_graph_task_id(), threading.get_ident()
    known = _known()
    same = [each for each in known if each.task == task]
    return same or [each for each in known if each.thread == thread and each.task < task]


def in_backward() -> bool:
    """Whether the caller runs within a backward, on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class _Alive:
    """Dies with the callback that holds it."""


def _queue(call: Callable[[], None]) -> weakref.ref[_Alive]:
    alive = _Alive()

    def callback(_: _Alive = alive) -> None:
        call()

    _queue_callback(callback)
    return weakref.ref(alive)


def _keep(running: Running) -> None:
    """Keeps `running` until the graph task is gone, whether it ends or raises."""
    with _changing:
        _running.add(running)

    def callback(_: Running = running) -> None:
        """Nothing: it is there to be dropped."""

    _queue_callback(callback)


def _queue_callback(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
