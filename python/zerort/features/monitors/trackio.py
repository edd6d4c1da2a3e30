"""`trackio`: a run of a project in Trackio's local database."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.monitors import Trackio
from zerort.features.monitors.member import Event, by_step, required

__all__ = ["TrackioRun"]


class TrackioRun:
    """The run that the program has begun already, which stays open, or one of its own."""

    def __init__(self, settings: Trackio) -> None:
        module = required("trackio", "trackio", "trackio")
        self._current = module.context_vars.current_run
        self._run = self._current.get()  # another `init` would end it
        self._owns = self._run is None
        if self._owns:
            self._run = module.init(project=settings.project)

    @staticmethod
    def check(settings: Trackio) -> None:
        """Raises `ConfigError` without the package."""
        required("trackio", "trackio", "trackio")

    def write(self, events: Sequence[Event]) -> None:
        """All of one step together."""
        for step, values in by_step(events).items():
            self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the run, if it is its own."""
        if not self._owns:
            return
        self._run.finish()
        if self._current.get() is self._run:
            self._current.set(None)
