"""The operating systems that this one is not: their differences on stand-ins, under the one set of
file operations that checkpoints use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zerort import platforms
from zerort.checkpoint.files import Disk
from zerort.errors import CheckpointError


class Msvcrt(ModuleType):
    """Windows' locks, by those of this system."""

    LK_NBLCK = 2

    def locking(self, file: int, mode: int, count: int) -> None:
        assert (mode, count, os.lseek(file, 0, os.SEEK_CUR)) == (self.LK_NBLCK, 1, 0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(errno.EDEADLK, "held") from error


class Libc:
    """macOS's rename call, by this system's."""

    def __init__(self) -> None:
        self.flags: list[int] = []

    def renamex_np(self, source: bytes, target: bytes, flags: Any) -> int:
        self.flags.append(flags.value)
        here = platforms.Linux()
        if flags.value == 4:
            if os.path.lexists(target):
                platforms.ctypes.set_errno(errno.EEXIST)
                return -1
            here.rename(Path(os.fsdecode(source)), Path(os.fsdecode(target)))
        else:
            here.exchange(Path(os.fsdecode(source)), Path(os.fsdecode(target)))
        return 0


@pytest.fixture(params=["Linux", "MacOS", "Posix", "Windows", "Plain"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    name = request.param
    if name in ("Windows", "Plain"):
        for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY"):
            monkeypatch.delattr(os, flag)
        monkeypatch.delattr(os, "preadv")
        monkeypatch.delattr(os, "kill")
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setattr(platforms.ctypes, "CDLL", None)
        monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt("msvcrt"))
    if name == "MacOS":
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD, raising=False)
    found = Disk()
    found.system = getattr(platforms, name)()
    if name == "MacOS":
        found.system._libc = Libc()
    yield found


def written(disk: Disk, path: Path, data: bytes = b"one\ntwo\r\n\x1a") -> Path:
    file = disk.create(path)
    disk.reserve(file, len(data))
    disk.write(file, memoryview(data))
    disk.sync(file)
    disk.close(file)
    disk.sync_folder(path.parent)
    return path


def test_what_is_written_is_read_at_any_place(disk: Disk, tmp_path: Path) -> None:
    path = written(disk, tmp_path / "f")
    assert disk.read_whole(path, 100) == b"one\ntwo\r\n\x1a"
    file = disk.open(path)
    into = bytearray(3)
    disk.read(file, 4, memoryview(into))
    assert into == b"two"
    with pytest.raises(CheckpointError, match="the file ends at byte"):
        disk.read(file, 9, memoryview(into))
    disk.close(file)


def test_a_file_is_created_never_reopened_and_no_link_is_followed(
    disk: Disk, tmp_path: Path
) -> None:
    path = written(disk, tmp_path / "f")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(FileExistsError):
        disk.create(path)
    with pytest.raises(OSError):
        disk.create(tmp_path / "link")
    with pytest.raises(CheckpointError, match="symbolic link"):
        disk.open(tmp_path / "link")
    assert path.read_bytes() == b"one\ntwo\r\n\x1a"


def test_a_rename_replaces_nothing(disk: Disk, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(disk, tmp_path / name / name)
    with pytest.raises(FileExistsError):
        disk.rename(tmp_path / "a", tmp_path / "b")
    disk.rename(tmp_path / "a", tmp_path / "c")
    assert disk.names(tmp_path) == ["b", "c"]
    assert disk.names(tmp_path / "c") == ["a"]


def test_two_names_change_places_or_the_way_out_is_said(disk: Disk, tmp_path: Path) -> None:
    one, two = written(disk, tmp_path / "one", b"1"), written(disk, tmp_path / "two", b"2")
    if isinstance(disk.system, platforms.Linux | platforms.MacOS):
        disk.exchange(one, two)
        assert (one.read_bytes(), two.read_bytes()) == (b"2", b"1")
    else:
        with pytest.raises(CheckpointError, match="save under another tag"):
            disk.exchange(one, two)
        assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")


def test_a_lock_is_seen_by_others_where_there_are_locks(disk: Disk, tmp_path: Path) -> None:
    path = written(disk, tmp_path / "f")
    held, second = disk.open(path), disk.open(path)
    if type(disk.system) is platforms.Plain:
        assert not disk.hold(held) and not disk.hold(second)
    else:
        assert disk.hold(held)
        with pytest.raises(BlockingIOError):
            disk.hold(second)
        disk.close(held)
        assert disk.hold(second)


def test_a_process_is_asked_for_only_where_asking_does_not_end_it(disk: Disk) -> None:
    assert disk.system.running(os.getpid())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert disk.system.running(gone.pid) is not isinstance(disk.system, platforms.Posix)


def test_a_system_without_its_modules_has_pythons_own_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert type(platforms.system("linux")) is platforms.Plain
    assert type(platforms.system("win32")) is platforms.Plain
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt("msvcrt"))
    assert type(platforms.system("win32")) is platforms.Windows


WINDOWS = """
import ctypes, os, sys
import torch, torch.distributed, numpy, pydantic, rich.console, safetensors.torch, xxhash

for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "preadv", "kill", "fork",
             "geteuid", "getuid", "uname"):
    delattr(os, name)
ctypes.CDLL = None
sys.platform = "win32"
import zerort

def engine():
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2},
              "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, "gradient_clipping": 0.0}
    return zerort.initialize(model=torch.nn.Linear(4, 4), config=config)[0]

def step(engine):
    engine.backward(engine(torch.ones(2, 4)).pow(2).mean())
    engine.step()

one, other = engine(), engine()
step(one)
one.save_checkpoint(sys.argv[1])
path, _ = other.load_checkpoint(sys.argv[1])
step(one), step(other)
assert torch.equal(one.module.weight, other.module.weight)
print("trained, saved and loaded", path)
"""


def test_one_process_trains_saves_and_loads_as_on_windows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WINDOWS, str(tmp_path / "run")],
        capture_output=True,
        check=False,
        text=True,
        timeout=150,
        # set by other libraries that look for devices; this way to look loads one of the system's
        env={k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"},
    )
    assert "trained, saved and loaded" in done.stdout, done.stderr[-3000:]
