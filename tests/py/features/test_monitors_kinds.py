"""Monitors by their kinds: files, MLflow's store, Comet by a stand-in, and the example's curve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ranks
from logged import log_lines
from monitored import (
    BOTH,
    LOSS,
    LR,
    engine_over,
    needs_tensorboard,
    scalars,
    values,
    window,
)
from zerort.config import load
from zerort.features.monitors import Event
from zerort.features.monitors.csv import CsvFiles

# ---- Files.


def csv_in(folder: Path) -> CsvFiles:
    return CsvFiles(monitors_section({"output_path": str(folder), "job_name": ""}))


def monitors_section(section: Any) -> Any:
    return load({"train_batch_size": 1, "csv_monitor": {"enabled": True, **section}}).csv_monitor


def test_a_row_that_a_crash_has_cut_off_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "loss.csv").write_text("step,loss\n2,0.5\n4,0.")
    files = csv_in(tmp_path)
    files.write([Event("loss", 0.25, 6)])
    assert (tmp_path / "loss.csv").read_text() == "step,loss\n2,0.5\n4,0.\n6,0.25\n"
    files.close()


@needs_tensorboard
def test_rows_are_with_the_operating_system_at_each_boundary(tmp_path: Path) -> None:
    done = ranks.attempt(1, die_after_two_boundaries, str(tmp_path))
    assert done == [ranks.Died(9)]
    assert [step for step, _ in values(tmp_path / "job", LR)] == [2, 4]
    assert [step for step, _ in scalars(tmp_path / "job", LR)] == [2, 4]


def die_after_two_boundaries(rank: int, world: int, folder: str) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def slowly(self: Any, data: bytes) -> None:
        time.sleep(0.05)  # on the writer's thread
        write(self, data)

    write, RecordWriter.write = RecordWriter.write, slowly
    os.chdir(folder)
    engine = engine_over(BOTH)
    window(engine)
    window(engine)
    os._exit(9)


# ---- MLflow.


def test_mlflow_reads_what_was_written_and_shows_the_run_as_ended(
    tmp_path: Path, monkeypatch: Any
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    section = {"enabled": True, "experiment": "seen", "run_name": "first"}
    engine = engine_over({"zerort": {"mlflow": section}})
    losses = [window(engine) for _ in range(3)]
    engine.destroy()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("seen")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    history = client.get_metric_history(run.info.run_id, LOSS)
    assert [metric.step for metric in history] == [2, 4, 6]
    assert [metric.value for metric in history] == pytest.approx([each[0] for each in losses])
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, LR)] == [0.5] * 3


def test_mlflow_goes_on_with_a_run_that_is_open_and_leaves_it_open(
    tmp_path: Path, monkeypatch: Any
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    with mlflow.start_run() as run:
        engine = engine_over({"zerort": {"mlflow": {"enabled": True}}})
        window(engine)
        engine.destroy()
        assert mlflow.active_run() is not None
        assert mlflow.get_run(run.info.run_id).info.status == "RUNNING"
    assert mlflow.MlflowClient().get_metric_history(run.info.run_id, LR)[0].step == 2


def test_a_store_of_mlflow_that_fails_is_dropped_without_waiting(
    tmp_path: Path, monkeypatch: Any
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    lines = log_lines()
    section = {"enabled": True, "tracking_uri": (tmp_path / "store").as_uri()}
    engine = engine_over({"zerort": {"mlflow": section}})

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
    for _ in range(50):  # another thread writes
        window(engine)
        if told := [line for line in lines if "zerort.mlflow raised OSError" in line]:
            break
    assert len(told) == 1
    engine.destroy()


# ---- Comet, by a stand-in for its package.


class Experiment:
    def __init__(self) -> None:
        self.logged: list[tuple[str, float, int]] = []
        self.name = ""
        self.ended = 0

    def log_metric(self, name: str, value: float, step: int) -> None:
        self.logged.append((name, value, step))

    def set_name(self, name: str) -> None:
        self.name = name

    def end(self) -> None:
        self.ended += 1


def stand_in(running: Experiment | None, started: list[Any]) -> Any:
    def start(**given: Any) -> Experiment:
        started.append((Experiment(), given))
        return started[-1][0]

    return SimpleNamespace(get_running_experiment=lambda: running, start=start)


@pytest.mark.parametrize(
    ("interval", "steps"), [(100, [2]), (4, [2, 6, 10]), (0, [2, 4, 6, 8, 10])]
)
def test_comet_gets_each_name_once_in_so_many_samples(
    interval: int, steps: list[int], monkeypatch: Any
) -> None:
    started: list[Any] = []
    monkeypatch.setitem(sys.modules, "comet_ml", stand_in(None, started))
    section = {
        "enabled": True,
        "samples_log_interval": interval,
        "project": "p",
        "api_key": "k",
        "experiment_name": "n",
        "online": False,
    }
    engine = engine_over({"comet": section})
    for _ in range(5):
        window(engine)
    engine.monitor.write_events([("own", 1.0, 3)])
    engine.destroy()
    ((experiment, given),) = started
    assert [step for name, _, step in experiment.logged if name == LR] == steps
    assert ("own", 1.0, 3) in experiment.logged
    assert (experiment.name, experiment.ended) == ("n", 1)
    assert (given["api_key"], given["project_name"], given["online"]) == ("k", "p", False)


def test_an_experiment_that_runs_already_is_gone_on_with_and_left_open(monkeypatch: Any) -> None:
    running, started = Experiment(), []
    monkeypatch.setitem(sys.modules, "comet_ml", stand_in(running, started))
    engine = engine_over({"comet": {"enabled": True}})
    window(engine)
    engine.destroy()
    assert started == [] and running.ended == 0 and len(running.logged) == 2


# ---- The example and its picture.


@pytest.mark.slow
def test_the_examples_curve_is_drawn_from_what_it_wrote(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    (tmp_path / "text").write_text("def spam(): return 1\n" * 5000)
    options = ["--monitors", "--steps=4", "--save_every=2", "--text=text", "--resume"]
    alone = (
        "import small_example as s; s.Standing.advance = s.train_text.Progress.advance; s.main()"
    )
    for program in (
        ["-c", alone, *options],
        [str(root / "docs/draw_monitor.py"), "runs/train_text/monitor", "--out=curve.svg"],
    ):
        done = subprocess.run(
            [sys.executable, *program],
            cwd=tmp_path,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(root / "tests" / "py"), *sys.path]),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "runs" / "train_text" / "monitor"
    assert len(values(folder, LOSS)) == 4
    assert [step for step, _ in values(folder, "Validation/bits_per_byte")] == [0, 32]
    drawn = (tmp_path / "curve.svg").read_text()
    assert drawn.count("<polyline") == 3 and "train_loss" in drawn
