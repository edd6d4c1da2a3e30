"""Saves of one process into one folder, one behind the other.

The lock in the folder tells jobs apart, and the second is refused. Engines of one job may well save
into one folder, and beside training they do so at the same time: the later save waits here for the
earlier one, on whichever thread. What it guarantees: a turn ends with the save that has it, also
where that was interrupted; a fork has none of its parent's.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

__all__ = ["TURNS", "Turns"]

_POLL = 0.5
"""Seconds between two looks whether a save has gone that did not end its turn."""


class Turns:
    """By folder, who has it: any object that can be referred to weakly."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[str, weakref.ref[object]] = {}

    def take(self, folder: Path, owner: object) -> None:
        """Returns once nobody else has `folder`."""
        key = os.path.realpath(folder)
        with self._changed:
            while not self._is_free(key):
                self._changed.wait(_POLL)
            self._held[key] = weakref.ref(owner)

    def end(self, owner: object) -> None:
        """Of all that `owner` has."""
        with self._changed:
            for key, held in list(self._held.items()):
                if held() is owner:
                    del self._held[key]
            self._changed.notify_all()

    def _is_free(self, key: str) -> bool:
        held = self._held.get(key)
        return held is None or held() is None


TURNS = Turns()
"""This process's."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: Turns.__init__(TURNS))
