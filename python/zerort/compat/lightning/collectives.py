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
from zerort.mesh import is_whole_job

__all__ = ["Collectives"]


_BROADCAST = "_broadcast_sigterm_tensor"


class Collectives:
    """Mixed into a strategy, before Lightning's class."""

    _engine: zerort.Engine | None
    _failed: bool

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("barrier of Lightning's"):
            super().barrier(*args, **kwargs)  # type: ignore[misc]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("broadcast of Lightning's"):
            return super().broadcast(obj, src)  # type: ignore[misc]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("reduce of Lightning's", group):
            return super().reduce(tensor, group, reduce_op)  # type: ignore[misc]

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As Lightning's. Raises `CommError` where a rank has gone."""
        with self._together("all_gather of Lightning's", group):
            gathered: Tensor = super().all_gather(tensor, group, sync_grads)  # type: ignore[misc]
            return gathered

    def _meet_before_batches(self, loop: Any) -> None:
        """Lightning broadcasts whether SIGTERM has come before each batch, past its strategy."""
        broadcast = getattr(loop, _BROADCAST, None)
        if broadcast is None:
            return

        def together() -> None:
            with self._together("the next batch of Lightning's"):
                broadcast()

        setattr(loop, _BROADCAST, together)

    def _leave_batches(self, loop: Any) -> None:
        vars(loop).pop(_BROADCAST, None)

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
    def _together(self, what: str, group: Any = None) -> Iterator[None]:
        """Around a collective of all ranks; one of a `group` alone meets nobody."""
        engine = self._engine
        if engine is None:
            yield
            return
        self._announce()
        try:
            if group is None or is_whole_job(group):
                engine.meet(what)
            yield
        except RuntimeError as error:
            if self._interrupted:
                engine.destroy()  # what a callback raises by then keeps Lightning from doing it
            if isinstance(error, ZerortError):
                raise
            raise engine.failure(what, error) from error
