"""Monitors: where readings of training go, a file here for each kind, and a row in the table.

Rank 0 writes, at every boundary, skipped ones too, against the samples that training has seen.
`member` has the contract. What a kind needs, its package or a folder, is looked at on rank 0 before
anything of the model moves (`check`), so that all ranks hear of it the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from zerort.config import Config
from zerort.errors import ConfigError
from zerort.features.monitors.comet import CometExperiment
from zerort.features.monitors.csv import CsvFiles
from zerort.features.monitors.member import Event, Member
from zerort.features.monitors.mlflow import MlflowRun
from zerort.features.monitors.tensorboard import TensorBoard
from zerort.features.monitors.trackio import TrackioRun
from zerort.features.monitors.wandb import WandbRun

__all__ = ["MEMBERS", "Event", "Member", "check", "is_on", "open_members"]


@dataclass(frozen=True)
class Kind:
    """One row of the table."""

    settings: Callable[[Config], Any]
    """Its section."""
    open: Callable[[Any], Member]
    """Makes a member; raises what it likes."""
    check: Callable[[Any], None]
    """Raises `ConfigError` where it could not."""


MEMBERS: Mapping[str, Kind] = {
    "tensorboard": Kind(lambda config: config.tensorboard, TensorBoard, TensorBoard.check),
    "csv_monitor": Kind(lambda config: config.csv_monitor, CsvFiles, CsvFiles.check),
    "wandb": Kind(lambda config: config.wandb, WandbRun, WandbRun.check),
    "comet": Kind(lambda config: config.comet, CometExperiment, CometExperiment.check),
    "trackio": Kind(lambda config: config.trackio, TrackioRun, TrackioRun.check),
    "zerort.mlflow": Kind(lambda config: config.zerort.mlflow, MlflowRun, MlflowRun.check),
}
"""By their sections of the configuration."""


def is_on(config: Config) -> bool:
    """Whether any is."""
    return any(kind.settings(config).enabled for kind in MEMBERS.values())


def check(config: Config) -> None:
    """Raises `ConfigError` for a package that cannot be imported and a folder that cannot be
    written.
    """
    for kind in MEMBERS.values():
        settings = kind.settings(config)
        if settings.enabled:
            kind.check(settings)


def open_members(config: Config) -> dict[str, Member]:
    """Those that are enabled. Raises `ConfigError` where one raises; those that are open are closed
    again.
    """
    opened: dict[str, Member] = {}
    with ExitStack() as undo:
        for name, kind in MEMBERS.items():
            settings = kind.settings(config)
            if not settings.enabled:
                continue
            try:
                opened[name] = kind.open(settings)
            except Exception as error:
                raise ConfigError(
                    f"{name} cannot be started, {type(error).__name__}: {error}; mend that, or set "
                    f'"{name}": {{"enabled": false}}'
                ) from error
            undo.callback(opened[name].close)
        undo.pop_all()
    return opened
