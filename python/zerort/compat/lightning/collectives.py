"""Lightning's own collectives, on the default process group, beside an engine.

What it guarantees: they wait for the evaluations that other ranks still run, and none waits for a
rank that has failed or gone: it raises that one's reason. What it does not do: where there is no
engine, which is outside `fit` below stage 3, they are as under DDP.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import zerort
from zerort.errors import ZerortError

__all__ = ["Collectives"]


class Collectives:
    """Mixed into a strategy, before Lightning's class."""

    _engine: zerort.Engine | None
    _failed: bool

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

    def _announce(self) -> None:
        """Where an exception is handled that the engine has not seen, as a callback's: the others
        hear of it before this rank makes a collective of its handling.
        """
        error = sys.exc_info()[1]
        if self._engine is not None and error is not None and self._interrupted:
            if not self._failed:
                self._engine.announce(error)
            self._failed = True

    @property
    def _interrupted(self) -> bool:
        return bool(self.lightning_module.trainer.interrupted)  # type: ignore[attr-defined]

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        engine = self._engine
        if engine is None:
            yield
            return
        self._announce()
        try:
            engine.meet(f"{what} of Lightning's")
            yield
        except RuntimeError as error:
            if self._interrupted:
                engine.destroy()  # what a callback raises by then keeps Lightning from doing it
            if isinstance(error, ZerortError):
                raise
            raise engine.failure(f"{what} of Lightning's", error) from error
