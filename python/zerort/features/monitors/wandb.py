"""`wandb`: a run of Weights & Biases, in a folder of its own with WANDB_MODE=offline."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.monitors import Wandb
from zerort.features.monitors.member import Event, by_step, required

__all__ = ["WandbRun"]


class WandbRun:
    """The run that the program has begun already, which stays open, or one of its own."""

    def __init__(self, settings: Wandb) -> None:
        module = required("wandb", "wandb", "wandb")
        self._run = module.run
        self._owns = self._run is None
        if self._owns:
            self._run = module.init(
                project=settings.project, group=settings.group, entity=settings.team
            )

    @staticmethod
    def check(settings: Wandb) -> None:
        """Raises `ConfigError` without the package."""
        required("wandb", "wandb", "wandb")

    def write(self, events: Sequence[Event]) -> None:
        """All of one step together."""
        for step, values in by_step(events).items():
            self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the run, if it is its own."""
        if self._owns:
            self._run.finish()
