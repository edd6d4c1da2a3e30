"""Lightning's own collectives, on the default process group, beside an engine.

What it guarantees: they wait for the evaluations that other ranks still run, and one that fails
because a rank has gone says which and why, in the words that it has left. What it does not do: a
rank that has failed and whose process goes on is waited for, until the time-out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import zerort
from zerort.errors import CommError

__all__ = ["Collectives"]


class Collectives:
    """Mixed into a strategy, before Lightning's class."""

    _engine: zerort.Engine | None

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("barrier"):
            super().barrier(*args, **kwargs)  # type: ignore[misc]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("broadcast"):
            return super().broadcast(obj, src)  # type: ignore[misc]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("reduce"):
            return super().reduce(tensor, group, reduce_op)  # type: ignore[misc]

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("all_gather"):
            gathered: Tensor = super().all_gather(tensor, group, sync_grads)  # type: ignore[misc]
            return gathered

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        engine = self._engine
        if engine is None:
            yield
            return
        if engine.optimizer is None:
            engine.meet("a collective of Lightning's")
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CommError):
                raise
            raise engine.failure(f"{what} of Lightning's", error) from error
