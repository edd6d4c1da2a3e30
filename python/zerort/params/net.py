"""The net under the hooks: what a backward reads of units although no module's output leads there.

`Uses` hooks the nodes of what modules return. A tensor that leaves a module otherwise, as an
attribute, is none of those, and a backward that begins at it reads units that nothing has brought.
So the graph below the loss is looked through before a backward that follows no list: each node that
has saved memory of a unit's gets a pre-hook of its own, which finds out whether the unit has been
needed in this backward. One that has not is brought then and there, and from then on at the
beginning of every backward.

What this guarantees: such a backward reads what is there, in the pass in which it is first seen.
What it does not do: it does not look into passes that follow a list, which pay nothing; a backward
that strays there reads guarded memory (`memory.values`), raises, and is looked through next time.
Nodes in a graph that is made within the backward, by reentrant checkpointing, are not looked at.
What it needs of torch (a saved tensor that tells its data without unpacking it) is private; where
that is missing, as in torch 2.6, edges to parameters are followed, and a frozen one has none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from zerort import _core
from zerort.errors import StepError
from zerort.grads.compiled import plain
from zerort.memory import unintercepted
from zerort.params.contract import Owner
from zerort.params.needs import Needs
from zerort.run.executor import Executor

__all__ = ["Net"]

_log = logging.getLogger("zerort")

_UNREADABLE = ("something reads the memory in which they", "out of bounds for storage of size 0")
"""What a kernel that reads guarded memory says, and torch of a view that it cannot make."""


class Watched(Protocol):
    """The passes under which the net is."""

    gatherer: _core.Gatherer
    needs: Needs
    is_open: bool
    owner: Owner


class Net:
    """Of one rank's `passes` over `units` units."""

    def __init__(self, passes: Watched, executor: Executor, units: int) -> None:
        self._passes = passes
        self._executor = executor
        self._units = units
        self.wrap = plain
        """Makes of a hook what is registered."""
        self.doubts = False
        """A pass has broken off: the next backward is looked through, if it follows a list too."""

    @contextmanager
    def under(self, root: Any, *, looks: bool) -> Iterator[None]:
        """Within, a backward from the node `root` runs. With `looks`, what it reads unasked is
        brought; without, `StepError` names it.
        """
        looks, self.doubts = looks or self.doubts, False
        if looks:
            for node, unit in self._readers(root):
                node.register_prehook(self.wrap(self._watching(unit)))
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _UNREADABLE):
                raise
            raise StepError(
                f"this backward reads {self._missing(root)}, which is sharded: the loss comes from "
                "a tensor inside a module that is not among its outputs, and did not in the "
                "backwards before. Return it from the module's forward, or go on: from the next "
                "backward on the parameters are brought"
            ) from error

    @unintercepted
    def _readers(self, root: Any) -> list[tuple[Any, int]]:
        """Nodes below `root` with the units whose memory they have saved."""
        storages = self._storages()
        return [
            (node, unit)
            for node in (_nodes(root) if root is not None else ())
            for unit in {storages[key] for key in _saved(node) if key in storages}
        ]

    def _missing(self, root: Any) -> str:
        """What the youngest node reads that has not run and finds nothing."""
        absent = [
            (node._sequence_nr(), unit)
            for node, unit in self._readers(root)
            if not all(bucket.values.is_whole for bucket in self._executor.unit(unit).buckets)
        ]
        return self._executor.unit(max(absent)[1]).contents if absent else "a parameter"

    def _storages(self) -> Mapping[int, int]:
        return {
            bucket.values.tensor.untyped_storage()._cdata: number
            for number in range(self._units)
            for bucket in self._executor.unit(number).buckets
        }

    def _watching(self, unit: int) -> Callable[[Any], None]:
        passes, holds = self._passes, self._passes.gatherer.holds

        def hook(_: Any) -> None:
            if not passes.is_open:
                passes.owner.reached()
            if passes.is_open and not holds(unit):
                self._bring(unit)

        return hook

    def _bring(self, unit: int) -> None:
        needs = self._passes.needs
        number = needs.set_of([unit])
        needs.need(number)
        needs.holds(number)
        _log.info(
            "a backward reads %s by a tensor that its module keeps beside its outputs: it is "
            "gathered at the beginning of every backward from now on. Return the tensor from the "
            "module's forward, and it is gathered when it is needed",
            self._executor.unit(unit).contents,
        )


def _nodes(root: Any) -> Iterator[Any]:
    """Of the graph below `root`, each once."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


def _saved(node: Any) -> Iterator[int]:
    """The storages of which `node` has saved views, but for what hooks have packed."""
    for tensor in _saved_tensors(node) if _TELLS else _parameters(node):
        if tensor.layout is torch.strided:
            yield tensor.untyped_storage()._cdata


_TELLS = hasattr(torch._C._autograd.SavedTensor, "data")


def _saved_tensors(node: Any) -> Iterator[Tensor]:
    for name in _fields(node.__class__):
        with suppress(RuntimeError):  # they have been given back
            saved = getattr(node, name)
            for each in saved if isinstance(saved, tuple | list) else (saved,):
                held = getattr(each, "data", None)
                if isinstance(held, Tensor):
                    yield held


@cache
def _fields(kind: Any) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _parameters(node: Any) -> Iterator[Tensor]:
    """Those that `node` has got, or views of them."""
    for below, _ in node.next_functions:
        if hasattr(below, "variable"):
            yield below.variable
        elif below is not None and below.name() in _VIEWS:
            yield from _parameters(below)


_VIEWS = frozenset(
    f"{name}Backward{overload}"
    for name in """
        AsStrided Expand Permute Select Slice Split SplitWithSizes Squeeze T Transpose Unbind
        Unsqueeze View
    """.split()  # noqa: SIM905
    for overload in range(3)
)
