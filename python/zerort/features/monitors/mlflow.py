"""`zerort.mlflow`: a run in MLflow's store, a folder of files unless another is named.

A thread of its own writes, so that no step waits for a server.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zerort.config.monitors import Mlflow
from zerort.features.monitors.member import Event, required

__all__ = ["MlflowRun"]

_FOLDER = "mlruns"


class MlflowRun:
    """The run that the program has begun already, which stays open, or one of its own, which ends
    with the process at the latest.
    """

    def __init__(self, settings: Mlflow) -> None:
        module = _module()
        self._metric = module.entities.Metric
        active = module.active_run() if settings.tracking_uri is None else None
        if active is not None:
            self._client = module.MlflowClient()
            self._run = active.info.run_id
        else:
            self._client = module.MlflowClient(tracking_uri=_store(settings))
            self._run = _begun(self._client, settings)
        self._end = weakref.finalize(self, self._client.set_terminated, self._run)
        if active is not None:
            self._end.detach()
        self._thread = ThreadPoolExecutor(1, "zerort-mlflow")
        self._under_way: deque[Future[Any]] = deque()

    @staticmethod
    def check(settings: Mlflow) -> None:
        """Raises `ConfigError` without the package."""
        _module()

    def write(self, events: Sequence[Event]) -> None:
        """One batch, behind the step. Raises what has become of an earlier one."""
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now, step) for name, value, step in events]
        self._under_way.append(self._thread.submit(self._client.log_batch, self._run, metrics))
        while self._under_way and self._under_way[0].done():
            self._take()

    def close(self) -> None:
        """Waits for what is under way, and ends the run, if it is its own."""
        while self._under_way:
            self._take()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _take(self) -> None:
        """Raises what has become of the oldest batch; then nothing is asked of the store again."""
        try:
            self._under_way.popleft().result()
        except BaseException:
            self._under_way.clear()
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._end.detach()
            raise


def _module() -> Any:
    return required("mlflow", "zerort.mlflow", "mlflow-skinny")


def _store(settings: Mlflow) -> str:
    """Where runs are kept: as configured, as MLflow's own variable says, else a folder here."""
    uri = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        uri = Path(_FOLDER).absolute().as_uri()
    if uri.startswith("file:"):
        # MLflow calls such a store old and refuses it unless one says that it is meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return uri


def _begun(client: Any, settings: Mlflow) -> str:
    """A new run of the experiment, which is made where it is not there."""
    found = client.get_experiment_by_name(settings.experiment)
    experiment = found.experiment_id if found else client.create_experiment(settings.experiment)
    run: str = client.create_run(experiment, run_name=settings.run_name).info.run_id
    return run
