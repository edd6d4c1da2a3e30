"""Ranks wait for one that works, longer than for a collective, and for nothing else."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import zerort
from catching import assert_told, caught
from zerort.checkpoint.files import Disk
from zerort.errors import CommError
from zerort.mesh import patience as watching
from zerort.mesh.patience import Patience, together

pytestmark = pytest.mark.timeout(90)
LIMIT = 60.0
SECONDS = 2.0  # what the slow rank needs, twice the communicator's time-out
TIMEOUT = timedelta(seconds=1)


class Control:
    """A communicator with a time-out of its own."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values


def patience(limit: float = 60.0, progress: Callable[[], int] = lambda: 0) -> Patience:
    return Patience("save checkpoint x", limit, "zerort.checkpoint.timeout", progress)


def _scenes(rank: int, world: int) -> dict[str, Any]:
    comm = Control()
    found: dict[str, Any] = {}

    def work(result: str) -> str:
        time.sleep(SECONDS if rank == 1 else 0.0)
        return result

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zerort").addHandler(handler)
    logging.getLogger("zerort").setLevel(logging.INFO)
    watching._SAID, watching._PERIOD = 0.5, 0.2
    begun = time.monotonic()
    found["slow"] = together(comm, patience(), lambda: work(f"of rank {rank}"))
    found["slow took"] = time.monotonic() - begun
    found["log"] = lines[:]

    begun = time.monotonic()
    for _ in range(20):
        together(comm, patience(), lambda: None)
    found["quick took"] = (time.monotonic() - begun) / 20

    found["standing"] = caught(
        lambda: together(comm, patience(1.0, lambda: 5_000_000_000), lambda: work("late"))
    )
    dist.barrier()
    amounts = iter(range(1000))
    found["moving"] = caught(
        lambda: together(comm, patience(1.5, lambda: next(amounts)), lambda: work("late"))
    )

    def interrupted() -> None:
        if rank == 1:
            raise KeyboardInterrupt

    try:
        together(comm, patience(), interrupted)
    except (CommError, KeyboardInterrupt) as error:
        found["interrupted"] = error.with_traceback(None)
    found["left over"] = [t.name for t in threading.enumerate() if t.name.startswith("zerort")]
    return found


@ranks.once(None)
def scenes() -> list[dict[str, Any]]:
    return ranks.run(2, _scenes, timeout=LIMIT)


def test_a_rank_that_works_is_waited_for_longer_than_for_a_collective() -> None:
    assert [found["slow"] for found in scenes()] == ["of rank 0", "of rank 1"]
    assert all(found["slow took"] > SECONDS - 0.1 for found in scenes())


def test_who_is_waited_for_is_logged_on_rank_0() -> None:
    first, other = scenes()
    assert first["log"] and all("waiting for rank 1 (0.00 GB done)" in s for s in first["log"])
    assert other["log"] == []


def test_work_that_is_soon_done_costs_no_waiting() -> None:
    assert all(found["quick took"] < watching._PERIOD / 2 for found in scenes())


def test_a_rank_that_stands_still_for_too_long_is_named_on_all() -> None:
    for found in scenes():
        assert_told(
            found["standing"], CommError, "cannot save checkpoint x", "rank 1 has stood still",
            "5.00 GB", "zerort.checkpoint.timeout is 1",
        )  # fmt: skip
        assert found["moving"] is None


def test_a_rank_that_gives_up_is_named_on_the_others() -> None:
    innocent, culprit = scenes()
    assert_told(innocent["interrupted"], CommError, "rank 1 was interrupted")
    assert isinstance(culprit["interrupted"], KeyboardInterrupt)


def test_no_thread_is_left() -> None:
    assert all(found["left over"] == [] for found in scenes())


# ---- checkpoints on slow disks


def _engine() -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zerort": {"timeout": 30, "checkpoint": {"overwrite": True}},
    }
    engine, *_ = zerort.initialize(model=nn.Linear(8, 8), config=config)
    engine.backward(engine(torch.ones(2, 8)).mean())
    engine.step()
    return engine


class Slow(Disk):
    """A disk whose operation `name` takes `SECONDS`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "_name"):
            time.sleep(SECONDS)
        return object.__getattribute__(self, name)


SLOW = {"write": (1, "sync"), "commit": (0, "rename"), "point": (0, "replace"), "read": (1, "read")}


def _save_and_load(rank: int, world: int, folder: str) -> dict[str, tuple[Any, float]]:
    engine = _engine()
    engine._parts.mesh.control.set_timeout(TIMEOUT)  # a start may need longer
    watching._PERIOD = 0.2
    found = {}
    for phase, (slow, operation) in SLOW.items():
        engine._checkpoints.disk = Slow(operation) if rank == slow else Disk()
        call = engine.load_checkpoint if phase == "read" else engine.save_checkpoint
        begun = time.monotonic()
        found[phase] = (caught(lambda call=call: call(folder)), time.monotonic() - begun)
    return found


@ranks.once(None)
def slow_disks() -> list[dict[str, tuple[Any, float]]]:
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run(2, _save_and_load, folder, timeout=LIMIT)


@pytest.mark.parametrize("phase", SLOW)
def test_a_slow_disk_is_no_dead_peer(phase: str) -> None:
    for found in slow_disks():
        error, seconds = found[phase]
        assert error is None and seconds > SECONDS - 0.1


def _die_while_writing(rank: int, world: int, folder: str) -> tuple[Any, float]:
    engine = _engine()
    if rank == 1:
        engine._checkpoints.disk = Slow("sync")
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    begun = time.monotonic()
    return caught(lambda: engine.save_checkpoint(folder)), time.monotonic() - begun


def test_a_rank_that_dies_while_it_writes_is_named_within_moments(tmp_path: Path) -> None:
    survivor, _ = ranks.attempt(2, _die_while_writing, str(tmp_path), timeout=20)
    assert isinstance(survivor, ranks.Returned), survivor
    error, seconds = survivor.value
    assert_told(error, CommError, "rank 1 (process")
    assert seconds < 15
    assert not (tmp_path / "latest").exists()
