"""Monitors: what rank 0 writes at each boundary, read back by the packages that show it; members
that fail, packages that are missing, losses that do not count.
"""

from __future__ import annotations

import csv
import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from catching import assert_told, caught
from logged import log_lines
from training import at_stage, keep
from zerort.config import load
from zerort.errors import ConfigError, StepError
from zerort.features import monitors
from zerort.features.monitors import Event, Kind
from zerort.features.monitors.csv import CsvFiles
from zerort.features.monitors.reporting import Monitored

LR, LOSS, SCALE = "Train/Samples/lr", "Train/Samples/train_loss", "Train/Samples/loss_scale"
CSV = {"csv_monitor": {"enabled": True, "job_name": "job"}}
BOTH = {**CSV, "tensorboard": {"enabled": True, "job_name": "job"}}
NAMED = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


def engine_over(config: Any, model: nn.Module | None = None, **more: Any) -> Any:
    model = nn.Linear(4, 4) if model is None else model
    config = {"train_micro_batch_size_per_gpu": 2, **config}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return zerort.initialize(model=model, optimizer=optimizer, config=config, **more)[0]


def window(engine: Any, draw: torch.Generator | None = None) -> list[float]:
    """One window; returns its losses."""
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        loss = engine(torch.randn(2, 4, generator=draw)).square().mean()
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    return losses


def rows(folder: Path, name: str) -> list[list[str]]:
    path = folder / f"{name.replace('/', '_')}.csv"
    with path.open(newline="") as file:
        return list(csv.reader(file))


def values(folder: Path, name: str) -> list[tuple[int, float]]:
    """What stands below the header."""
    header, *rest = rows(folder, name)
    assert header == ["step", name.rpartition("/")[2]]
    return [(int(step), float(value)) for step, value in rest]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports is its own affair
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        shown = EventAccumulator(str(folder))
        shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(name)]


# ---- What is written, on one rank and on two, with a checkpoint in the middle.

VARIANTS = [(0, 1), (0, 3), (2, 1), (2, 3)]


def train_and_resume(
    rank: int, world: int, folder: str, variants: Sequence[tuple[int, int]]
) -> list[Any]:
    """Each rank works in a folder of its own, so that what it writes is found there. Returns the
    losses of the windows, for each variant.
    """
    found = []
    for stage, gas in variants:
        name = f"{stage}-{gas}"
        os.makedirs(os.path.join(folder, name, str(rank)))
        os.chdir(os.path.join(folder, name, str(rank)))
        draw = torch.Generator().manual_seed(rank)
        config = {"gradient_accumulation_steps": gas, **BOTH, **at_stage(stage)}
        engine = engine_over(config, **NAMED)
        assert engine.monitor.enabled
        losses = [window(engine, draw) for _ in range(3)]
        engine.save_checkpoint(os.path.join(folder, name, "saved"))
        engine.destroy()
        engine = engine_over(config, **NAMED)
        engine.load_checkpoint(os.path.join(folder, name, "saved"))
        losses += [window(engine, draw) for _ in range(2)]
        engine.monitor.write_events([("Validation loss", torch.tensor(rank + 0.5), 7)])
        keep(engine)
        found.append(losses)
    return found


@pytest.fixture(scope="module", params=[1, 2])
def trained(request: Any, tmp_path_factory: Any) -> tuple[Path, int, Any]:
    folder = tmp_path_factory.mktemp("monitored")
    return folder, request.param, ranks.run(request.param, train_and_resume, str(folder), VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rank_0_writes_each_boundary_and_a_resumed_run_goes_on(
    trained: tuple[Path, int, Any], variant: tuple[int, int]
) -> None:
    folder, world, found = trained
    stage, gas = variant
    here = folder / f"{stage}-{gas}"
    losses = found[0][VARIANTS.index(variant)]
    samples = [2 * gas * world * (i + 1) for i in range(5)]
    means = [sum(each) / gas for each in losses]
    assert len(losses) == 5 and all(len(each) == gas for each in losses)
    wanted = {
        LOSS: means,
        LR: [0.5**power for power in range(2, 7)],  # after the scheduler
    }
    for name, expected in wanted.items():
        for read in (values, scalars):
            steps, got = zip(*read(here / "0" / "job", name), strict=True)
            assert list(steps) == samples, read
            assert list(got) == pytest.approx(expected, rel=1e-6), read
    assert (here / "0" / "job" / "Validation_loss.csv").read_text() == (
        "step,Validation loss\n7,0.5\n"
    )
    assert not (here / "0" / "job" / "Train_Samples_loss_scale.csv").exists()


def test_other_ranks_write_nothing(trained: tuple[Path, int, Any]) -> None:
    folder, world, _ = trained
    for rank in range(1, world):
        for stage, gas in VARIANTS:
            assert list((folder / f"{stage}-{gas}" / str(rank)).iterdir()) == []


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


# ---- The loss scale, and steps that are skipped.


def test_a_skipped_step_is_written_with_the_scale_after_it(tmp_path: Path) -> None:
    config = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "a"},
        "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "auto_cast": True},
    }
    engine = engine_over(config)
    window(engine)
    engine.backward(engine(torch.full((2, 4), float("inf"))).float().sum())
    engine.step()
    assert engine.skipped_steps == 1
    window(engine)
    keep(engine)
    assert values(tmp_path / "a", SCALE) == [(2, 16.0), (4, 8.0), (6, 8.0)]
    assert [step for step, _ in values(tmp_path / "a", LR)] == [2, 4, 6]
    losses = values(tmp_path / "a", LOSS)
    assert [step for step, _ in losses] == [2, 4, 6] and losses[1][1] not in (losses[0][1], 0.0)


# ---- Which losses count.


class Noted:
    """A member that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def write(self, events: Sequence[Event]) -> None:
        self.events += events

    def close(self) -> None:
        self.closed += 1

    def of(self, name: str) -> list[float]:
        return [event.value for event in self.events if event.name == name]


def monitored(
    monkeypatch: Any, *members: Any, config: Any = None, model: nn.Module | None = None
) -> Any:
    """An engine whose only monitors are these."""
    on = SimpleNamespace(enabled=True)
    table = {
        f"member {i}": Kind(lambda _: on, lambda _, m=member: m, lambda _: None)
        for i, member in enumerate(members)
    }
    monkeypatch.setattr(monitors, "MEMBERS", table)
    return engine_over(config or {}, model)


class Scaled(nn.Module):
    """The loss is what it is given, times a weight of one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: float) -> Tensor:
        return self.weight * x


def micro(engine: Any, loss: float) -> None:
    engine.backward(engine(loss))
    engine.step()


FROZEN = {"gradient_accumulation_steps": 2, "gradient_clipping": 1e-6}
"""Weights hardly move, so that a loss is what the test says."""


def test_the_losses_of_a_failed_window_are_in_no_mean(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    micro(engine, 1.0)
    micro(engine, 3.0)
    micro(engine, 100.0)

    def interfere(grad: Tensor) -> None:
        raise RuntimeError("not this one")

    loss = engine(50.0)
    loss.register_hook(interfere)
    with pytest.raises(RuntimeError, match="not this one"):
        engine.backward(loss)
    engine.step()  # the window has ended with its failure
    micro(engine, 5.0)
    micro(engine, 7.0)
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([2.0, 6.0], rel=1e-3)


def test_the_losses_that_zero_grad_drops_are_in_no_mean(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    micro(engine, 100.0)
    engine.zero_grad()
    micro(engine, 3.0)
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([3.0], rel=1e-3)


def fail_on_the_other_rank(rank: int, world: int, folder: str) -> Any:
    os.chdir(folder)
    engine = engine_over({**CSV, **FROZEN}, Scaled())
    micro(engine, 100.0)
    loss = engine(100.0)
    if rank == 1:
        loss.register_hook(lambda grad: 1 / 0)
    told = caught(lambda: (engine.backward(loss), engine.step()))
    if rank == 1:
        engine.step()
    micro(engine, 1.0)
    micro(engine, 2.0)
    keep(engine)
    return told


def test_a_window_that_fails_on_another_rank_leaves_no_loss_behind(tmp_path: Path) -> None:
    told, _ = ranks.run(2, fail_on_the_other_rank, str(tmp_path))
    assert_told(told, StepError, "rank 1")
    assert values(tmp_path / "job", LOSS) == [(8, pytest.approx(1.5, rel=1e-3))]


def test_a_loss_is_copied_and_its_graph_goes(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    loss = engine(4.0)
    in_graph = Noted()
    loss.grad_fn.metadata["held"] = in_graph
    held = weakref.ref(in_graph)
    engine.backward(loss, retain_graph=True)
    engine.step()
    loss.detach().zero_()
    del loss, in_graph
    gc.collect()
    assert held() is None
    micro(engine, 4.0)
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([4.0], rel=1e-3)


def test_a_backward_of_the_users_own_has_no_loss_but_a_rate(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, model=Scaled())
    engine(1.0).backward()
    engine.step()
    keep(engine)
    assert [event[0] for event in noted.events] == [LR] and noted.of(LR) == [0.5]


# ---- What other features read.


def test_readings_of_other_features_are_written_and_one_that_raises_is_said_once(
    monkeypatch: Any,
) -> None:
    noted, lines = Noted(), log_lines()
    engine = monitored(monkeypatch, noted, model=Scaled())
    shown: list[Any] = [("Train/Samples/elapsed_time_ms_step", 1.5)]
    other = engine._events.features[-1]
    monkeypatch.setattr(type(other), "readings", lambda self: shown)
    micro(engine, 1.0)
    assert ("Train/Samples/elapsed_time_ms_step", 1.5, 2) in noted.events

    def refuse(self: Any) -> Any:
        raise RuntimeError("no reading")

    monkeypatch.setattr(type(other), "readings", refuse)
    micro(engine, 1.0)
    micro(engine, 1.0)
    assert engine.global_steps == 3
    assert len([line for line in lines if "raised RuntimeError: no reading" in line]) == 1
    monkeypatch.undo()
    micro(engine, 1.0)
    keep(engine)
    assert [event.step for event in noted.events if event.name == LR] == [2, 8]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_eigenvalues_are_written_where_they_were_computed(monkeypatch: Any) -> None:
    noted = Noted()
    section = {
        "enabled": True,
        "layer_name": "layers",
        "layer_num": 2,
        "gas_boundary_resolution": 2,
        "max_iter": 3,
    }
    config = {"eigenvalue": section, "gradient_accumulation_steps": 3}
    engine = monitored(monkeypatch, noted, config=config, model=Layers())
    losses = [window(engine) for _ in range(4)]
    keep(engine)
    for block in range(2):
        name = f"Train/Eigenvalues/ModelBlockParam_{block}"
        assert [event.step for event in noted.events if event.name == name] == [12, 24]
    assert noted.of(LOSS) == pytest.approx([sum(each) / 3 for each in losses])


# ---- Members that fail.


class Broken(Noted):
    """Raises where it is asked to."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def write(self, events: Sequence[Event]) -> None:
        if self.at == "write":
            raise OSError(28, "No space left on device")
        super().write(events)

    def close(self) -> None:
        super().close()
        if self.at == "close":
            raise ConnectionError("gone")


def test_a_member_that_fails_is_said_once_dropped_and_closed(monkeypatch: Any) -> None:
    lines, broken, noted = log_lines(), Broken("write"), Noted()
    engine = monitored(monkeypatch, broken, noted, model=Scaled())
    for _ in range(3):
        micro(engine, 1.0)
    assert len([line for line in lines if "member 0 raised OSError" in line]) == 1
    assert len(noted.of(LR)) == 3 and broken.closed == 1 and engine.monitor.enabled
    engine.destroy()
    assert (broken.closed, noted.closed) == (1, 1)


def test_a_member_that_cannot_be_closed_takes_nothing_from_the_others(monkeypatch: Any) -> None:
    lines, broken, noted = log_lines(), Broken("close"), Noted()
    engine = monitored(monkeypatch, noted, broken, noted, model=Scaled())
    micro(engine, 1.0)
    engine.destroy()
    engine.destroy()
    assert noted.closed == 2
    assert (
        len([line for line in lines if "could not be closed, ConnectionError: gone" in line]) == 1
    )
    engine.monitor.write_events([("late", 1.0, 1)])
    assert noted.of("late") == []


def test_an_engine_that_is_dropped_closes_its_monitors(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, model=Scaled())
    micro(engine, 1.0)
    del engine
    gc.collect()
    assert noted.closed == 1


def test_ctrl_c_in_a_member_goes_through_and_the_step_stands(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    micro(engine, 1.0)

    def interrupt(self: Any, events: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as within, pytest.raises(KeyboardInterrupt):
        within.setattr(Noted, "write", interrupt)
        micro(engine, 2.0)
    assert engine.global_steps == 1
    micro(engine, 3.0)
    micro(engine, 5.0)
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([4.0], rel=1e-3)


def test_what_was_opened_is_closed_again_where_a_later_one_cannot_be(monkeypatch: Any) -> None:
    noted, on = Noted(), SimpleNamespace(enabled=True)

    def refuse(settings: Any) -> Any:
        raise TimeoutError("no answer")

    table = {
        "first": Kind(lambda _: on, lambda _: noted, lambda _: None),
        "second": Kind(lambda _: on, refuse, lambda _: None),
    }
    monkeypatch.setattr(monitors, "MEMBERS", table)
    with pytest.raises(ConfigError, match="second cannot be started, TimeoutError: no answer"):
        engine_over({})
    assert noted.closed == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_one_warning(tmp_path: Path) -> None:
    lines = log_lines()
    (tmp_path / "Train_Samples_lr.csv").symlink_to("/dev/full")
    engine = engine_over(
        {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": ""}}
    )
    for _ in range(3):
        window(engine)
    engine.destroy()
    assert engine.global_steps == 3
    assert len([line for line in lines if "No space left on device" in line]) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_event_file_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    lines = log_lines()
    engine = engine_over({"tensorboard": {"enabled": True, "output_path": str(tmp_path)}})
    window(engine)

    def refuse(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", refuse)
    for _ in range(3):
        window(engine)
    engine.destroy()
    assert len([line for line in lines if "monitor tensorboard raised OSError" in line]) == 1


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


def test_rows_are_with_the_operating_system_at_each_boundary(tmp_path: Path) -> None:
    done = ranks.attempt(1, die_after_two_boundaries, str(tmp_path))
    assert done == [ranks.Died(9)]
    assert [step for step, _ in values(tmp_path / "job", LR)] == [2, 4]
    assert [step for step, _ in scalars(tmp_path / "job", LR)] == [2, 4]


def die_after_two_boundaries(rank: int, world: int, folder: str) -> None:
    os.chdir(folder)
    engine = engine_over(BOTH)
    window(engine)
    window(engine)
    os._exit(9)


# ---- What cannot begin.


def without(rank: int, world: int, lacking: int, module: str, section: str) -> Any:
    if rank == lacking:
        sys.modules[module] = None  # type: ignore[assignment]
    config = {section: {"enabled": True}}
    if "." in section:
        head, _, last = section.partition(".")
        config = {head: {last: {"enabled": True}}}
    return caught(lambda: keep(engine_over(config)))


@pytest.mark.parametrize(
    ("section", "module", "package"),
    [
        ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
        ("wandb", "wandb", "wandb"),
        ("comet", "comet_ml", "comet_ml"),
        ("trackio", "trackio", "trackio"),
        ("zerort.mlflow", "mlflow", "mlflow-skinny"),
    ],
)
def test_a_missing_package_is_named_with_how_to_get_it(
    section: str, module: str, package: str, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    error = without(1, 1, 0, module, section)
    assert_told(error, ConfigError, section, f"pip install {package}")


def test_a_package_that_rank_0_lacks_is_missed_on_all_ranks_and_no_other_needs_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    told = ranks.run(2, without, 0, "torch.utils.tensorboard", "tensorboard")
    for error in told:
        assert_told(error, ConfigError, "tensorboard", "pip install tensorboard")
    assert ranks.run(2, without, 1, "torch.utils.tensorboard", "tensorboard") == [None, None]


def into_a_file(rank: int, world: int, path: str) -> Any:
    section = {"enabled": True, "output_path": path}
    return caught(lambda: engine_over({"csv_monitor": section}))


def test_a_folder_that_cannot_be_written_is_named_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error in ranks.run(2, into_a_file, str(tmp_path / "file")):
        assert_told(error, ConfigError, "csv_monitor.output_path", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("tensorboard", "path", "x"),
        ("csv_monitor", "output_path", 3),
        ("wandb", "porject", "x"),
        ("comet", "samples_log_interval", -1),
        ("comet", "mode", "append"),
        ("trackio", "space_id", "x"),
    ],
)
def test_what_a_section_cannot_have_is_named_by_its_path(
    section: str, key: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"{section}.{key}"):
        load({"train_batch_size": 1, section: {"enabled": True, key: value}})


def test_a_key_of_comet_is_not_shown_where_the_configuration_is() -> None:
    config = load({"train_batch_size": 1, "comet": {"api_key": "very secret"}})
    assert "very secret" not in config.model_dump_json() + repr(config)
    assert config.comet.api_key is not None
    assert config.comet.api_key.get_secret_value() == "very secret"


# ---- The door.


def test_without_a_monitor_events_are_taken_and_nothing_happens(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = engine_over({"tensorboard": {"output_path": "x"}, "csv_monitor": {"enabled": False}})
    assert not engine.monitor.enabled
    engine.monitor.write_events([("a", object(), None)])
    window(engine)
    keep(engine)
    assert list(tmp_path.iterdir()) == []
    assert engine._events.find(Monitored) is None


def test_numbers_and_tensors_are_written_and_what_is_none_is_named_once(monkeypatch: Any) -> None:
    noted, lines = Noted(), log_lines()
    engine = monitored(monkeypatch, noted)
    given: list[Any] = [
        ("int", 1, 3),
        ("tensor", torch.tensor(2.5, requires_grad=True), 3),
        ("half", torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor(3)),
        ("text", "much", 3),
        ("text", "more", 4),
        ("many", torch.ones(2), 3),
        ("short",),
    ]
    engine.monitor.write_events(event for event in given)
    keep(engine)
    assert noted.events == [("int", 1.0, 3), ("tensor", 2.5, 3), ("half", 0.5, 3)]
    told = [line for line in lines if "expected (name, number, samples)" in line]
    assert len(told) == 3


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
    ("interval", "steps"), [(100, [2]), (3, [2, 6, 10]), (0, [2, 4, 6, 8, 10])]
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


# ---- Weights.


def test_monitors_change_no_weight(tmp_path: Path, monkeypatch: Any) -> None:
    """A twin without them, to the bit."""
    monkeypatch.chdir(tmp_path)

    def weights(config: Any) -> Tensor:
        torch.manual_seed(0)
        engine = engine_over({**config, **at_stage(2), "gradient_accumulation_steps": 3})
        for _ in range(3):
            window(engine)
        keep(engine)
        return engine.module.weight.detach().clone()

    assert torch.equal(weights(BOTH), weights({}))


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
