"""Changes that can be taken back, for what may fail after some of it has been done."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Undo"]


class Undo:
    """How to take back what was done, in the opposite order."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def later(self, what: str, call: Callable[[], object]) -> None:
        """`call` takes back a change of `what` that is about to be made."""
        self._steps.append((what, call))

    def run(self) -> list[str]:
        """Takes all back, once. Returns what could not be, with the reason."""
        failures = []
        while self._steps:
            what, call = self._steps.pop()
            try:
                call()
            except Exception as error:
                failures.append(f"{what}: {type(error).__name__}: {error}")
        return failures
