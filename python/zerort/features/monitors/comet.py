"""`comet`: an experiment of Comet; with `online` false an archive that can be uploaded."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.monitors import Comet
from zerort.features.monitors.member import Event, required

__all__ = ["CometExperiment"]


class CometExperiment:
    """The experiment that runs already, which stays open, or one of its own. Each name is written
    at most once in `samples_log_interval` samples.
    """

    def __init__(self, settings: Comet) -> None:
        module = required("comet_ml", "comet", "comet_ml")
        self._experiment = module.get_running_experiment()
        self._owns = self._experiment is None
        if self._owns:
            key = settings.api_key
            self._experiment = module.start(
                api_key=None if key is None else key.get_secret_value(),
                workspace=settings.workspace,
                project_name=settings.project,
                experiment_key=settings.experiment_key,
                mode=settings.mode,
                online=settings.online,
            )
        if settings.experiment_name is not None:
            self._experiment.set_name(settings.experiment_name)
        self._interval = settings.samples_log_interval
        self._last: dict[str, int] = {}

    @staticmethod
    def check(settings: Comet) -> None:
        """Raises `ConfigError` without the package."""
        required("comet_ml", "comet", "comet_ml")

    def write(self, events: Sequence[Event]) -> None:
        """Those that are due."""
        for name, value, step in events:
            if name not in self._last or step - self._last[name] >= self._interval:
                self._experiment.log_metric(name, value, step=step)
                self._last[name] = step

    def close(self) -> None:
        """Ends the experiment, if it is its own."""
        if self._owns:
            self._experiment.end()
