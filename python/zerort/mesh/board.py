"""What ranks leave for one another in the job's store, where no collective can pass any more.

What it guarantees: no call takes longer than it is given, even when the store's host hangs; after
the first that gets no answer, none is asked again. No thread is left inside the store when the
interpreter ends: torch's call would come back into an interpreter that is being taken down, and
abort the process. (Only a store that hangs for ever can keep one there, and that one does not come
back.)

What it does not do: it keeps no order between ranks, and what it holds is not deleted.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

__all__ = ["Board", "Store", "Unanswered", "board_of"]

PATIENCE = 1.0
"""Seconds that the interpreter's end may wait for calls under way."""

T = TypeVar("T")


class Store(Protocol):
    """What is used of torch.distributed's Store."""

    def set(self, key: str, value: str, /) -> None:
        """Leaves `value`."""

    def get(self, key: str, /) -> bytes:
        """What was left."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them were."""

    def add(self, key: str, amount: int, /) -> int:
        """Adds to a counter, which begins at 0; returns what it is then."""


class Unanswered(Exception):
    """The store has gone, or did not answer in time."""


class Board:
    """Two kinds of notes: entries of logs, which all ranks read, and words under a key of their
    own.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._answers = True

    def post(self, log: str, entry: str, seconds: float) -> None:
        """Adds `entry` to `log`. Raises `Unanswered`, as all methods do."""
        self._ask(lambda: self.store.set(f"{log}/{self.store.add(log, 1)}", entry), seconds)

    def news(self, log: str, known: int, seconds: float) -> list[str]:
        """The entries of `log` behind the first `known`, as far as they have arrived in order."""

        def read() -> list[str]:
            entries: list[str] = []
            for number in range(known + 1, self.store.add(log, 0) + 1):
                key = f"{log}/{number}"
                if not self.store.check([key]):
                    break  # numbered, and a moment away
                entries.append(self.store.get(key).decode())
            return entries

        return self._ask(read, seconds)

    def leave(self, key: str, word: str, seconds: float) -> None:
        """Leaves `word` under `key`; waits for no answer, so that a dead store is not noticed."""
        self._ask(lambda: self.store.set(key, word), seconds)

    def find(self, keys: Iterable[str], seconds: float) -> dict[str, str]:
        """Those of the words under `keys` that were left."""

        def look() -> dict[str, str]:
            return {key: self.store.get(key).decode() for key in keys if self.store.check([key])}

        return self._ask(look, seconds)

    def _ask(self, call: Callable[[], T], seconds: float) -> T:
        if not self._answers:
            raise Unanswered
        try:
            return _within(seconds, call)
        except Unanswered:
            self._answers = False
            raise


_boards: list[Board] = []
"""The last store's. A store answers one call at a time, so its engines share one board."""


def board_of(store: Store) -> Board:
    """The board in `store`."""
    if not _boards or _boards[0].store is not store:
        _boards[:] = [Board(store)]
    return _boards[0]


_asking: set[threading.Thread] = set()


def _within(seconds: float, call: Callable[[], T]) -> T:
    """`call()` on a thread of its own, because nothing else bounds a call of the store's."""
    answers: list[T] = []

    def ask() -> None:
        try:
            answers.append(call())
        except (RuntimeError, ValueError):
            pass  # the store has gone with its host
        finally:
            _asking.discard(thread)

    thread = threading.Thread(target=ask, name="zerort-board", daemon=True)
    _asking.add(thread)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise Unanswered
    return answers[0]


@atexit.register
def _let_finish() -> None:
    """Ctrl-C may have broken off the wait for a call."""
    for thread in list(_asking):
        thread.join(PATIENCE / max(1, len(_asking)))
