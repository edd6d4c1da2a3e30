"""torchmetrics' own synchronisation, beside an engine.

A metric gathers its states on the default process group when it is computed, behind what may be an
uneven number of batches. What it guarantees: metrics of a module, wherever they are in it, wait for
the evaluations of other ranks and hear of a rank that fails, as Lightning's own collectives do.
What it does not do: a metric that is no part of the module, or is made while an engine lives, is
left alone, and so is one that is synchronised over a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

__all__ = ["Metrics"]

Together = Callable[[str, Any], AbstractContextManager[None]]
"""Around a collective of this name over this group, which is None where all ranks make it."""


class Metrics:
    """Those of `module`, from here until `give_back`."""

    def __init__(self, module: nn.Module, together: Together) -> None:
        self._metrics = [part for part in module.modules() if isinstance(part, Metric)]
        for metric in self._metrics:
            metric.dist_sync_fn = _Gather(metric.dist_sync_fn, together)

    def give_back(self) -> None:
        """They synchronise as before."""
        for metric in self._metrics:
            if isinstance(metric.dist_sync_fn, _Gather):
                metric.dist_sync_fn = metric.dist_sync_fn.given


class _Gather:
    """A metric's gather; copied or pickled it is the one that was `given`."""

    def __init__(self, given: Callable[..., Any] | None, together: Together) -> None:
        self.given = given
        self._together = together

    def __call__(self, tensor: Any, group: Any = None) -> Any:
        with self._together("the synchronisation of a metric", group):
            return (self.given or gather_all_tensors)(tensor, group=group)

    def __reduce__(self) -> Any:
        return _same, (self.given,)


def _same(given: Any) -> Any:
    return given
