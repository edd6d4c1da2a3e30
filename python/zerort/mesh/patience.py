"""Waiting for ranks that work: a disk may need longer than any collective should.

    rank 0   works ──── done ┐ gather   gather   gather
    rank 1   works ··········│·······│········│···· done ┐ gather: all are done, and all go on

While a rank works, a thread of its own takes part in a small gather every half second, with what
its rank has done so far; a rank that is done gathers too. What it guarantees: a rank that works is
waited for, however long it takes; one that dies is found as in any collective, within moments; one
that stands still for longer than `Patience.limit`, or gives up, is named on all ranks. The thread
is joined before the work is handed on, so that the communicator is never used by two at a time.

What it does not do: it breaks no work off, and work may not use the communicator.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from zerort.errors import CommError

__all__ = ["Gathers", "Patience", "together"]

_log = logging.getLogger("zerort")
_PERIOD = 0.5  # seconds between two gathers while this rank works
_SAID = 10.0  # seconds between two lines in the log

T = TypeVar("T")


class Gathers(Protocol):
    """What is used of a communicator."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def world(self) -> int:
        """How many there are."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""


def _nothing() -> int:
    return 0


@dataclass(frozen=True)
class Patience:
    """How ranks wait for one that works."""

    work: str
    """What it does, for errors and the log: "save checkpoint runs/a/global_step10"."""
    limit: float
    """Seconds that a rank may stand still."""
    limited_by: str
    """The configuration's key that sets `limit`."""
    progress: Callable[[], int] = _nothing
    """Bytes done on this rank so far. Called on another thread."""


@dataclass(frozen=True)
class _State:
    """What a rank brings to a gather."""

    done: bool
    gives_up: bool
    still: float
    """Seconds since `amount` changed."""
    amount: int


def together(comm: Gathers, patience: Patience, work: Callable[[], T]) -> T:
    """Runs `work` on every rank, and returns its result once all ranks are through.

    Raises `CommError` when another rank has died, given up or stood still for too long; what `work`
    raises, at once, and then the others hear that this rank gave up.
    """
    if comm.world == 1:
        return work()
    watch = _Watch(comm, patience)
    watch.start()
    try:
        result = work()
        watch.done.set()
        watch.join()
    except BaseException:
        watch.gives_up = True
        watch.done.set()
        watch.join()
        raise
    if watch.error is not None:
        raise watch.error
    return result


class _Watch(threading.Thread):
    """Gathers until all ranks are done, or one of them cannot be waited for."""

    def __init__(self, comm: Gathers, patience: Patience) -> None:
        # Not a daemon: one that comes back into an interpreter that is being taken down aborts it.
        super().__init__(name="zerort-patience")
        self.done = threading.Event()
        self.gives_up = False
        self.error: BaseException | None = None
        self._comm, self._patience = comm, patience
        self._amount, self._changed = 0, time.monotonic()
        self._begun = self._said = time.monotonic()

    def run(self) -> None:
        try:
            while True:
                self.done.wait(_PERIOD)
                states: list[_State] = self._comm.gather_objects(self._state())
                self._refuse(states)
                if all(state.done for state in states):
                    return
                self._say(states)
        except BaseException as error:
            self.error = error

    def _state(self) -> _State:
        amount, now = self._patience.progress(), time.monotonic()
        if amount != self._amount:
            self._amount, self._changed = amount, now
        return _State(self.done.is_set(), self.gives_up, now - self._changed, amount)

    def _refuse(self, states: Sequence[_State]) -> None:
        """All ranks see the same states, so all come to the same end."""
        patience = self._patience
        for rank, state in enumerate(states):
            if state.gives_up:
                raise CommError(
                    f"rank {self._comm.rank}: cannot {patience.work}: rank {rank} was interrupted "
                    "and gave up"
                )
            if not state.done and state.still > patience.limit:
                raise CommError(
                    f"rank {self._comm.rank}: cannot {patience.work}: rank {rank} has stood still "
                    f"for {state.still:.0f} s, after {state.amount / 1e9:.2f} GB; "
                    f"{patience.limited_by} is {patience.limit:g}"
                )

    def _say(self, states: Sequence[_State]) -> None:
        now = time.monotonic()
        if self._comm.rank != 0 or now - self._said < _SAID:
            return
        self._said = now
        working = [rank for rank, state in enumerate(states) if not state.done]
        shown = ", ".join(
            f"rank {rank} ({states[rank].amount / 1e9:.2f} GB done)" for rank in working[:8]
        )
        more = f" and {len(working) - 8} more" if len(working) > 8 else ""
        _log.info(
            "%s: %.0f s so far, waiting for %s%s",
            self._patience.work,
            now - self._begun,
            shown,
            more,
        )
