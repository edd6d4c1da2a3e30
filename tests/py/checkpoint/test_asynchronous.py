"""Saves beside training: what is saved is the state at the call, a failure costs no training, and
nothing is cut off at the end.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

import homes
import ranks
from homes import BOTH, OPTIMIZER, Setting
from saved import GLOBAL_BATCH, WIDTH, config_of, engine_of, manifest_of, train
from training import keep
from zerort import platforms
from zerort.checkpoint import copies, pace, problems
from zerort.checkpoint.files import Disk
from zerort.checkpoint.tensors import Stored
from zerort.errors import CheckpointError

BEFORE = 2
"""Steps."""


class Held(Disk):
    """Opens no file for writing until it is let go; then fails, if it is to."""

    def __init__(self, fails: bool = False) -> None:
        self.go = threading.Event()
        self.came = threading.Event()
        self.fails = fails

    def create(self, path: Path) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.came.set()
            assert self.go.wait(30)
            if self.fails and path.name.startswith("rank"):
                raise OSError(28, "No space left on device")
        return super().create(path)


def dataset() -> Any:
    return [torch.full((WIDTH,), float(i)) for i in range(64)]


def trained(stage: int, **more: Any) -> Any:
    config = config_of(stage, zerort={"reduce_at": "micro_batch"})
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 50}
    engine = engine_of(config, **more)
    keep(engine)
    return engine


def muon(params: Any) -> Any:
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-2)


def whole(stage: int) -> Any:
    """An optimizer that looks at whole parameters, whose masters are exchanged."""
    model = nn.Sequential(nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH, bias=False))
    config = config_of(stage, zerort={"whole_padding": 0})
    engine = engine_of(config, model, muon)
    keep(engine)
    return engine


def step(engine: Any, rank: int, world: int, number: int) -> None:
    share = GLOBAL_BATCH // world
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(GLOBAL_BATCH, WIDTH, generator=generator)[rank * share : (rank + 1) * share]
    engine.backward(engine(x).float().pow(2).mean())
    engine.step()


ENGINES: dict[str, Callable[[], Any]] = {
    "stage 0": lambda: trained(0),
    "stage 2 with its loader": lambda: trained(2, training_data=dataset()),
    "stage 3": lambda: trained(3),
    "exchanged": lambda: whole(2),
}


def same_files(one: Path, other: Path, world: int) -> None:
    for rank in range(world):
        name = f"rank_{rank}.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    left, right = manifest_of(one), manifest_of(other)
    for key in ("saved", "saved_ns"):
        del left[key], right[key]
    assert left == right


def save_twice(rank: int, world: int, folder: str) -> None:
    """Synchronously and beside five further steps, which the writer waits for."""
    for name, made in ENGINES.items():
        engine = made()
        for number in range(BEFORE):
            step(engine, rank, world, number)
        if engine.training_dataloader is not None:
            next(iter(engine.training_dataloader))
        kept = {"epochs": [1, 2], "best": torch.arange(3.0)}
        engine.save_checkpoint(Path(folder) / name, "sync", kept)
        engine._checkpoints.disk = disk = Held()
        with torch.inference_mode(name == "stage 0"):
            engine.save_checkpoint(Path(folder) / name, "beside", kept, asynchronous=True)
        kept["epochs"].append(3)  # type: ignore[attr-defined]
        kept["best"].zero_()  # type: ignore[attr-defined]
        for number in range(5):
            step(engine, rank, world, number)
        torch.rand(7)
        random.random()
        for buffer in engine.module.buffers():
            buffer.zero_()
        disk.go.set()
        engine.wait_for_checkpoint()
        step(engine, rank, world, 9)
        engine._checkpoints.disk = Disk()
        engine.save_checkpoint(Path(folder) / name, "again", asynchronous=True)
        engine.load_checkpoint(Path(folder) / name)  # waits
        assert engine.global_steps == BEFORE + 6


def test_what_is_saved_beside_training_is_the_state_at_the_call_to_the_bit(tmp_path: Path) -> None:
    ranks.shared(2, save_twice, str(tmp_path))
    for name in ENGINES:
        same_files(tmp_path / name / "sync", tmp_path / name / "beside", 2)
        assert problems(tmp_path / name, "again") == []


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_at_home_on_the_host_is_saved_as_it_was(stage: int, tmp_path: Path) -> None:
    disk = Held()

    def save(engine: Any, step: int) -> None:
        if step == 1:
            with _disable_current_modes():  # files are written from memory of nobody's
                engine.save_checkpoint(tmp_path, "sync")
                engine._checkpoints.disk = disk
                engine.save_checkpoint(tmp_path, "beside", asynchronous=True)

    ran = homes.train(Setting(stage, "bf16", steps=4), BOTH if stage == 3 else OPTIMIZER, 0, save)
    disk.go.set()
    ran.engine.wait_for_checkpoint()
    same_files(tmp_path / "sync", tmp_path / "beside", 1)


def step_on(engine: Any, rank: int, world: int) -> None:
    """Until one raises; the writer gets a processor between them."""
    for number in range(1000):
        step(engine, rank, world, number)
        time.sleep(0.01)


def fail(rank: int, world: int, folder: str) -> list[str]:
    """Rank 1's disk is full; what each call raises on this rank."""
    engine = trained(1)
    train(engine, rank, world, range(1))
    engine.save_checkpoint(folder, "old")
    said = []
    calls = {
        "step": lambda: step_on(engine, rank, world),
        "wait": engine.wait_for_checkpoint,
        "save": lambda: engine.save_checkpoint(folder, "next"),
        "load": lambda: engine.load_checkpoint(folder),
        "destroy": engine.destroy,
    }
    for name, call in calls.items():
        engine._checkpoints.disk = disk = Held(fails=rank == 1)
        engine.save_checkpoint(folder, f"new-{name}", asynchronous=True)
        disk.go.set()
        before = engine.global_steps
        try:
            call()
            said.append(f"{name} raised nothing")
        except CheckpointError as error:
            said.append(f"{engine.global_steps - before if name == 'step' else ''}{error}")
        engine._checkpoints.disk = Disk()
        if name != "destroy":
            step(engine, rank, world, 1)  # it goes on
            engine.wait_for_checkpoint()  # and a failure is raised once
            engine.save_checkpoint(folder, f"after-{name}", asynchronous=True)
    return said


def test_a_failure_is_raised_on_all_ranks_at_one_call_and_the_engine_goes_on(
    tmp_path: Path,
) -> None:
    ours, theirs = ranks.shared(2, fail, str(tmp_path))
    assert ours == theirs
    for name, message in zip(("step", "wait", "save", "load", "destroy"), ours, strict=True):
        assert f"checkpoint {tmp_path}/new-{name} was not saved" in message, message
        assert "rank 1: [Errno 28] No space left on device" in message
        assert not (tmp_path / f"new-{name}").exists()
    for name in ("step", "wait", "save", "load"):
        assert problems(tmp_path, f"after-{name}") == []
    assert not (tmp_path / "next").exists()
    assert list(tmp_path.glob(".tmp-*")) == []


def save_with_little(rank: int, world: int, folder: str) -> tuple[list[str], list[bool]]:
    """Memory is short on rank 1, then it is not."""
    engine = trained(1)
    step(engine, rank, world, 0)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zerort").addHandler(handler)
    real = platforms.HERE.free_memory
    threads = []
    try:
        for tag, free in (("a", 1), ("b", 1), ("c", 1 << 40)):
            platforms.HERE.free_memory = lambda free=free: free if rank else 1 << 40  # type: ignore
            engine._checkpoints.disk = disk = Held()
            disk.go.set()
            # rank 0 says how, should the others say something else
            engine.save_checkpoint(folder, tag, asynchronous=rank == 0 or tag != "c")
            engine.wait_for_checkpoint()
            threads.append(disk.came.is_set())
    finally:
        del platforms.HERE.free_memory
        logging.getLogger("zerort").removeHandler(handler)
    assert platforms.HERE.free_memory == real
    return [line for line in lines if "memory is short" in line], threads


def test_where_memory_is_short_on_a_rank_all_save_synchronously_and_say_so_once(
    tmp_path: Path,
) -> None:
    (said, threads), (quiet, others) = ranks.shared(2, save_with_little, str(tmp_path))
    assert threads == others == [False, False, True]
    assert len(said) == 1 and quiet == []
    assert all(problems(tmp_path, tag) == [] for tag in "abc")


def test_memory_is_limited_by_the_groups_that_a_process_is_in(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    free = platforms.Linux(tmp_path).free_memory
    assert free() is None
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:      90 kB\n")
    assert free() == 90 << 10
    write("proc/self/cgroup", "4:cpu,memory:/job\n0::/a/b\n")
    assert free() == 90 << 10
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "7\n")
    write("sys/fs/cgroup/a/memory.max", "50000\n")
    write("sys/fs/cgroup/a/memory.current", "30000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 1000\n")
    assert free() == 21000
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "9500\n")
    assert free() == 0


# One process.


def alone(disk: Disk | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    engine = engine_of(config_of(1, **more), nn.Linear(4, 4))
    if disk is not None:
        engine._checkpoints.disk = disk
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    return engine


def test_the_configuration_asks_for_it_and_gets_memory_before_it_is_needed(tmp_path: Path) -> None:
    disk = Held()
    engine = alone(disk, zerort={"checkpoint": {"asynchronous": True}})
    background = engine._checkpoints.background
    assert background._writer is not None and background._writer.wait(10)
    got = background._copies.nbytes
    assert got > 0
    engine.save_checkpoint(tmp_path, "one")
    assert not (tmp_path / "one").exists()
    assert not background._writer.daemon
    assert background._copies.nbytes == got
    disk.go.set()
    engine.save_checkpoint(tmp_path, "two", asynchronous=False)  # waits for the first
    assert problems(tmp_path, "one") == problems(tmp_path, "two") == []
    engine.destroy()


def test_ctrl_c_while_state_is_copied_comes_once_the_save_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = alone()
    real = copies.Copies.copy

    def interrupted(self: Any, tensors: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, tensors)

    monkeypatch.setattr(copies.Copies, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.save_checkpoint(tmp_path, "one", asynchronous=True)
    engine.wait_for_checkpoint()
    assert problems(tmp_path, "one") == []
    engine.destroy()


@pytest.mark.parametrize("what", ["memory", "a thread"])
def test_where_no_memory_or_thread_can_be_got_the_save_is_synchronous(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = alone()

    def none(*_: Any) -> None:
        raise RuntimeError("none left")

    if what == "memory":
        monkeypatch.setattr(copies.Copies, "reserve", none)
    else:
        monkeypatch.setattr(threading.Thread, "start", none)
    engine.save_checkpoint(tmp_path, "one", asynchronous=True)
    assert problems(tmp_path, "one") == []
    engine.destroy()


def test_a_fork_waits_for_no_writer_of_its_parents(tmp_path: Path) -> None:
    disk = Held()
    engine = alone(disk)
    engine.save_checkpoint(tmp_path, "one", asynchronous=True)
    assert disk.came.wait(10)
    child = os.fork()
    if child == 0:
        engine.wait_for_checkpoint()
        os._exit(0)
    for _ in range(500):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the fork waits")
    disk.go.set()
    engine.destroy()
    assert problems(tmp_path, "one") == []


def test_a_folder_that_vanishes_costs_that_checkpoint_alone(tmp_path: Path) -> None:
    disk, folder = Held(), tmp_path / "runs"
    engine = alone(disk)
    engine.save_checkpoint(folder, "one", asynchronous=True)
    assert disk.came.wait(10)
    shutil.rmtree(folder)
    disk.go.set()
    with pytest.raises(CheckpointError, match=r"wait_for_checkpoint\(\).*runs/one was not saved"):
        engine.wait_for_checkpoint()
    engine.save_checkpoint(folder, "two", asynchronous=True)
    engine.destroy()
    assert problems(folder, "two") == []


class Host:
    """Beside a device whose copies are over when they are waited for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self.calls.append(f"locks {numel}")
        return torch.zeros(numel, dtype=dtype)

    def receive(self, here: torch.Tensor, there: torch.Tensor) -> Any:
        assert here.dtype == there.dtype and here.shape == there.shape
        number = len(self.calls)
        self.calls.append(f"receives {here.numel()}")
        return SimpleNamespace(wait=lambda: self.calls.append(f"waits for {number}"))


def test_what_is_on_a_device_is_received_into_locked_memory_and_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host()
    device = SimpleNamespace(host=lambda pinned: host if pinned else None)
    monkeypatch.setattr(copies, "device_for", lambda place: device)
    there = [torch.zeros(300_000, device="meta"), torch.zeros(5, 2, device="meta").t()]
    stored = [Stored.of("one", there[0]), Stored.of("two", there[1])]
    stored.append(Stored.of("three", torch.arange(4)))
    made = copies.Copies(torch.device("cuda"))
    made.reserve(copies.bytes_of(stored))
    made.touch(host.calls.clear)
    copied = made.copy(stored)
    assert host.calls == ["locks 1200072", "receives 1200000", "receives 40", "waits for 2"]
    assert torch.cat(list(copied[2].pieces)).view(torch.int64).tolist() == [0, 1, 2, 3]


def test_more_memory_is_got_beside_what_there_is() -> None:
    made = copies.Copies(torch.device("cpu"))
    kept = torch.arange(3 << 18, dtype=torch.int32)  # 3 MiB, over three blocks
    for size in (10, (1 << 20) + 9, 3 << 20):
        made.reserve(size)
    assert made.nbytes >= 3 << 20 and len(made._blocks) == 3
    (copied,) = made.copy([Stored.of("kept", kept)])
    assert torch.equal(torch.cat(list(copied.pieces)).view(torch.int32), kept)


def faults(call: Callable[[], object]) -> int:
    """Pages that the system gives this thread meanwhile."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="counts the pages that Linux gives")
@pytest.mark.parametrize("touched", [True, False])
def test_pages_are_given_once_and_a_child_takes_none_of_them(touched: bool) -> None:
    before, made = (copies.Copies(torch.device("cpu")) for _ in range(2))
    size = 64 << 20
    stored = [Stored.of(name, torch.ones(size // 8)) for name in ("one", "two")]
    before.reserve(size)
    before.copy(stored)  # whose code has pages too
    made.reserve(size)
    rests: list[None] = []
    if touched:
        made.touch(lambda: rests.append(None))
        assert len(rests) >= 16
    first = faults(lambda: made.copy(stored))
    again = faults(lambda: made.copy(stored))
    # in a fork the parent's writes would copy pages, for as long as the child lives
    ends, starts = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(starts)
        os.read(ends, 1)
        os._exit(0)
    try:
        beside = faults(lambda: made.copy(stored))
    finally:
        os.close(starts)
        os.waitpid(child, 0)
        os.close(ends)
    small, large = size >> 12, size >> 21  # the system may have no large pages left
    assert again < large / 2, (first, again, beside)
    assert beside < small / 8, (first, again, beside)  # a fork costs the interpreter some
    assert first < large / 2 if touched else first >= large, (first, again, beside)


def test_a_writer_that_rests_goes_on_at_once_where_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests, real = threading.Event(), threading.Event.wait

    def told(self: threading.Event, seconds: float | None = None) -> bool:
        if seconds is not None and seconds > 1e6:
            rests.set()
            seconds = 60
            assert real(self, seconds), "nobody has told it to hurry"
        return real(self, seconds)

    monkeypatch.setattr(threading.Event, "wait", told)
    monkeypatch.setattr(pace, "SHARE", 1e-12)
    monkeypatch.setattr(pace, "_PIECE", 0.0)
    monkeypatch.setattr(platforms.HERE, "waited_for_processor", lambda: None)
    engine = alone()
    engine.save_checkpoint(tmp_path, "one", asynchronous=True)
    assert rests.wait(30)
    assert not (tmp_path / "one").exists()
    engine.wait_for_checkpoint()
    assert problems(tmp_path, "one") == []
    engine.destroy()


def test_an_engine_that_is_dropped_ends_its_save_and_a_failure_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for fails, tag in ((False, "one"), (True, "two")):
        disk = Held(fails)
        engine = alone(disk)
        engine.save_checkpoint(tmp_path, tag, asynchronous=True)
        writer = engine._checkpoints.background._writer
        assert disk.came.wait(10)
        del engine
        gc.collect()
        disk.go.set()
        writer.join(30)
        assert not writer.is_alive()
    assert problems(tmp_path, "one") == []
    assert f"checkpoint {tmp_path}/two was not saved" in caplog.text
    assert not (tmp_path / "two").exists()


AT_EXIT = """
import sys, time
sys.path[:0] = {path!r}
from test_asynchronous import Disk, alone
class Slow(Disk):
    def create(self, path):
        time.sleep(0.2)
        if {fails} and path.name.startswith("rank"):
            raise OSError(28, "No space left on device")
        return super().create(path)
engine = alone(Slow())
engine.save_checkpoint({folder!r}, "one", asynchronous=True)
"""


@pytest.mark.parametrize("fails", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_interpreters_end_waits_for_a_save_and_says_that_it_failed(
    fails: bool, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    code = AT_EXIT.format(path=sys.path, folder=folder, fails=fails)
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if fails:
        assert f"checkpoint {tmp_path}/one was not saved" in done.stderr
    else:
        assert problems(tmp_path, "one") == []


def test_the_trace_has_the_stall_and_on_a_lane_of_its_own_the_writing(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    engine = alone(zerort={"trace": {"path": str(path)}})
    engine.save_checkpoint(tmp_path, "one", asynchronous=True)
    engine.destroy()
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = {lanes[e["tid"]]: e["name"] for e in events if e["ph"] == "X" and "save" in e["name"]}
    assert spans == {"main": "save"}
    wrote = [e for e in events if e["ph"] == "X" and lanes[e["tid"]] == "checkpoint"]
    assert [e["name"] for e in wrote] == [f"checkpoint {tmp_path}/one"]
