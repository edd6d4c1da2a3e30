"""Tuning, where the configuration or the environment asks for it."""

from __future__ import annotations

from zerort.errors import ConfigError
from zerort.features.site import Site
from zerort.step.events import Feature
from zerort.tune.feature import FirstWindow, Tuning, unfit
from zerort.tune.findings import Findings
from zerort.tune.task import Task

__all__ = ["open_tuning"]


def open_tuning(site: Site) -> Feature | None:
    """Raises `ConfigError` for an engine that cannot be tuned."""
    task, parts = Task.given(), site.parts
    if task is None and not site.config.zerort.tune:
        return None
    reason = unfit(parts)
    if reason is not None:
        asks = "zerort.tune" if task is None else "zerort tune"
        raise ConfigError(f"{asks}: {reason}; leave it out")
    if task is None:
        return FirstWindow(parts)
    return _asked_by_command(site, task)


def _asked_by_command(site: Site, task: Task) -> Tuning:
    def progress(steps: int) -> None:
        if site.is_first:
            task.write("observing", steps=steps)

    def found(findings: Findings) -> None:
        if site.is_first:
            task.write("measured", **findings.document())

    progress(0)
    return Tuning(site.parts, task.steps, found, ends=True, progress=progress)
