"""The door to the monitors: `engine.monitor`.

A member looks on. If one raised through a step, rank 0 would leave its peers; so an `Exception` of
a member is said once, as a warning, the member is dropped and training goes on. What is no
`Exception`, Ctrl-C above all, goes through.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from threading import RLock
from typing import Any

import torch

from zerort.features.monitors.member import Event, Member

__all__ = ["Monitor"]

_log = logging.getLogger("zerort")


class Monitor:
    """Writes events to the members, by their sections' names; only rank 0 has some."""

    def __init__(self, members: Mapping[str, Member] | None = None, *, enabled: bool) -> None:
        self.enabled = enabled
        """Whether the configuration asks for a monitor: the same on all ranks."""
        self._members = dict(members or {})
        self._unreadable: set[str] = set()
        self._lock = RLock()  # a signal's handler may write too

    def write_events(self, event_list: Iterable[tuple[str, Any, Any]]) -> None:
        """Writes (name, value, step) each: a number or a tensor of one element, and the samples
        that training has seen, `engine.global_samples`.

        Nothing happens on other ranks than 0, and where no monitor is on. A tensor on an
        accelerator is waited for. Raises nothing: a value that is no number is named in the log,
        once a name, and not written.
        """
        if not self._members:
            return
        with self._lock:
            events = [event for given in event_list if (event := self._read(given)) is not None]
            if events:
                for name, member in list(self._members.items()):
                    self._write(name, member, events)

    def close(self) -> None:
        """Closes the members; nothing is written afterwards."""
        with self._lock:
            while self._members:
                name, member = self._members.popitem()
                try:
                    member.close()
                except Exception as error:
                    _log.warning(
                        "monitor %s could not be closed, %s: %s; its last events may be missing",
                        name,
                        type(error).__name__,
                        error,
                    )

    def _write(self, name: str, member: Member, events: list[Event]) -> None:
        try:
            member.write(events)
        except Exception as error:
            del self._members[name]
            _log.warning(
                "monitor %s raised %s: %s; it is not written any more, and training goes on",
                name,
                type(error).__name__,
                error,
                exc_info=error,
            )
            with suppress(Exception):
                member.close()

    def _read(self, given: Any) -> Event | None:
        try:
            name, value, step = given
            value = value.detach().item() if isinstance(value, torch.Tensor) else value
            return Event(str(name), float(value), int(step))
        except Exception as error:
            said = f"{given!r:.200}" if not isinstance(given, tuple) else str(given[:1])
            if said not in self._unreadable:
                self._unreadable.add(said)
                _log.warning(
                    "engine.monitor.write_events: expected (name, number, samples), got %s..., "
                    "of which %s: %s; it is not written",
                    said,
                    type(error).__name__,
                    error,
                )
            return None
