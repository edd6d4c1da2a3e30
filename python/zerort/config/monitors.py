"""Sections of monitors: where a step's readings go (`zerort.features.monitors`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr

from zerort.config.section import Section, whole

__all__ = ["Comet", "Mlflow", "MonitorFolder", "Trackio", "Wandb"]


class MonitorFolder(Section):
    """`tensorboard` and `csv_monitor`: files in output_path/job_name."""

    enabled: bool = False
    output_path: str = ""
    """Empty is the working directory."""
    job_name: str = "DeepSpeedJobName"


class Wandb(Section):
    """`wandb`: a run of Weights & Biases."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class Comet(Section):
    """`comet`: an experiment of Comet; what is left out follows from Comet's own settings."""

    enabled: bool = False
    samples_log_interval: Annotated[int, BeforeValidator(whole), Field(ge=0)] = 100
    """Samples between two values of a name."""
    project: str | None = None
    workspace: str | None = None
    api_key: SecretStr | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    """false: an archive on this machine."""
    mode: Literal["get", "create", "get_or_create"] | None = None
    """Whether an experiment goes on or is a new one; None is get_or_create."""


class Trackio(Section):
    """`trackio`: a run of a project in Trackio's local database."""

    enabled: bool = False
    project: str = "deepspeed"


class Mlflow(Section):
    """`zerort.mlflow`: a run in MLflow's store."""

    enabled: bool = False
    tracking_uri: str | None = None
    """None follows MLFLOW_TRACKING_URI, and is the folder mlruns without it."""
    experiment: str = "zerort"
    run_name: str | None = None
    """None lets MLflow invent one."""
