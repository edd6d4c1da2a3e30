"""Monitors that fail in a step, which stands, and those that cannot begin, which no rank does."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ranks
from catching import assert_told, caught
from logged import log_lines
from monitored import (
    FROZEN,
    LOSS,
    LR,
    Noted,
    Scaled,
    engine_over,
    micro,
    monitored,
    needs_tensorboard,
    window,
)
from training import keep
from zerort.config import describe, load
from zerort.errors import ConfigError
from zerort.features import monitors
from zerort.features.monitors import Event, Kind

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
@needs_tensorboard
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


@needs_tensorboard
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
    given = {"train_batch_size": 1, "comet": {"api_key": "very secret"}}
    config = load(given)
    assert "very secret" not in config.model_dump_json() + repr(config) + str(describe(given))
    assert config.comet.api_key is not None
    assert config.comet.api_key.get_secret_value() == "very secret"
