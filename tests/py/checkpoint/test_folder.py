"""A folder of checkpoints: `latest`, what is swept, pruned and overwritten, and what is somebody
else's and stays.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from crashes import Failing
from saved import config_of, engine_of, manifest_of
from zerort.checkpoint import get_fp32_state_dict
from zerort.errors import CheckpointError

NONCE = "0123456789abcdef"


def fresh(**more: Any) -> Any:
    return engine_of(config_of(1, **more), nn.Linear(3, 3))


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = fresh()
    yield engine
    engine.destroy()


def tags(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}


# `latest`.


def test_every_flipped_bit_of_latest_is_an_error_that_names_it(engine: Any, tmp_path: Path) -> None:
    for tag in ("step1", "step2", "step3"):  # a bit apart
        engine.save_checkpoint(tmp_path, tag)
    path = tmp_path / "latest"
    good = path.read_bytes()
    assert good == f"step3\n{sha256(b'step3').hexdigest()}\n".encode()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            engine.load_checkpoint(tmp_path)
        assert f"{path} is damaged" in str(caught.value), (bit, bytes(data))
    assert "step3: load it by tag, or with fallback=True" in str(caught.value)
    assert engine.load_checkpoint(tmp_path, fallback=True)[0] == str(tmp_path / "step3")


@pytest.mark.parametrize(
    "content",
    [b"", b"step1", b"step1\n", b"../../etc\n", b"x" * 300, None],
    ids=["empty", "no line", "no hash", "a path", "long", "a path with its hash"],
)
def test_a_latest_that_no_save_wrote_is_refused(
    content: bytes | None, engine: Any, tmp_path: Path
) -> None:
    engine.save_checkpoint(tmp_path, "step1")
    path = f"../{tmp_path.name}/step1"
    hashed = f"{path}\n{sha256(path.encode()).hexdigest()}\n".encode()
    (tmp_path / "latest").write_bytes(hashed if content is None else content)
    with pytest.raises(CheckpointError, match=r"latest .*step1"):
        engine.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="latest"):
        get_fp32_state_dict(tmp_path)


# Tags that are something else.


def test_a_tag_that_is_a_symbolic_link_is_not_followed(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path / "there", "t")
    folder = tmp_path / "here"
    engine.save_checkpoint(folder, "good")
    (folder / "linked").symlink_to(tmp_path / "there" / "t")
    for call in (
        lambda: engine.load_checkpoint(folder, "linked"),
        lambda: get_fp32_state_dict(folder, "linked"),
        lambda: engine.save_checkpoint(folder, "linked", overwrite=True),
    ):
        with pytest.raises(CheckpointError, match="symbolic link"):
            call()
    assert (folder / "linked").is_symlink() and (tmp_path / "there" / "t").exists()
    assert engine.load_checkpoint(folder)[0] == str(folder / "good")


def test_overwriting_replaces_checkpoints_and_nothing_else(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "file").write_text("work")
    engine.save_checkpoint(tmp_path, "noted")
    (tmp_path / "noted" / "notes.txt").write_text("work")
    for tag, name in (("thesis", "chapter"), ("file", "a file"), ("noted", r"notes\.txt")):
        with pytest.raises(CheckpointError, match=f"exists already.*{name}"):
            engine.save_checkpoint(tmp_path, tag, overwrite=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"
    assert (tmp_path / "noted" / "notes.txt").exists()


# What saves and exports that died have left.

OTHERS: dict[str, dict[str, str]] = {
    ".tmp-thesis": {"chapter": "years of work"},
    f".tmp-thesis-{NONCE}": {"chapter": "years of work"},
    f".tmp-a-{NONCE}": {"manifest.json": "", "notes.txt": "work"},
    f".tmp-b-{NONCE}": {".git": "work"},
    ".tmp-a-0123": {"manifest.json": ""},
    f".tmp-latest-{NONCE[:-1]}0": {"manifest.json": "", "more": ""},
}
FILES_OF_OTHERS = {
    ".tmp-notes": "work",
    f".tmp-latest-{NONCE}": "what I did lately",
    f".tmp-model.bin-{NONCE}": "an export under way",
}
OURS = {
    f".tmp-global_step7-{NONCE}": {"rank_0.safetensors": "half", "manifest.json": ""},
    f".tmp-empty-{NONCE}": {},
}
BEGUN = [b"", b"step", b"step1\n0123", b"step1\n" + b"0" * 64 + b"\n", b"step1" + bytes(66)]


def put(folder: Path, folders: dict[str, dict[str, str]]) -> None:
    for name, held in folders.items():
        (folder / name).mkdir()
        for file, text in held.items():
            (folder / name / file).write_text(text)


def test_a_save_deletes_what_dead_saves_left_and_nothing_of_others(
    engine: Any, tmp_path: Path
) -> None:
    put(tmp_path, OTHERS)
    for name, text in FILES_OF_OTHERS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / f".tmp-linked-{NONCE}").symlink_to(tmp_path / ".tmp-thesis")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    put(tmp_path, OURS)
    for number, data in enumerate(BEGUN):
        (tmp_path / f".tmp-latest-{number:016x}").write_bytes(data)
    engine.save_checkpoint(tmp_path, "a")
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    new = {Path(name) for name in ("a", "latest", ".lock", "zero_to_fp32.py")}
    assert {path for path in after - before if path.parts[0] != "a"} == new - {Path("a")}
    assert before <= after


def test_an_export_deletes_what_a_dead_one_of_its_name_left(engine: Any, tmp_path: Path) -> None:
    (tmp_path / f".tmp-pytorch_model.bin-{NONCE}").write_text("half")
    kept = {".tmp-pytorch_model.bin-of-others", f".tmp-other.bin-{NONCE}"}
    for name in kept:
        (tmp_path / name).write_text("not ours")
    engine.save_16bit_model(tmp_path)
    assert set(os.listdir(tmp_path)) == kept | {"pytorch_model.bin"}


class Slow(Failing):
    """Waits in the first write until it is let go."""

    def __init__(self) -> None:
        super().__init__(None)
        self.begun, self.go = threading.Event(), threading.Event()

    def hook(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "write":
            self.begun.set()
            assert self.go.wait(30)


def test_an_export_under_way_is_left_alone_by_other_exports_and_saves(
    engine: Any, tmp_path: Path
) -> None:
    slow = fresh()
    slow._checkpoints.disk = disk = Slow()
    exporting = threading.Thread(target=slow.save_16bit_model, args=(tmp_path,))
    exporting.start()
    assert disk.begun.wait(30)
    under_way = list(tmp_path.glob(".tmp-pytorch_model.bin-*"))
    engine.save_16bit_model(tmp_path)
    engine.save_checkpoint(tmp_path, "t")
    assert list(tmp_path.glob(".tmp-*")) == under_way and len(under_way) == 1
    disk.go.set()
    exporting.join()
    assert sorted(os.listdir(tmp_path)) == [
        ".lock",
        "latest",
        "pytorch_model.bin",
        "t",
        "zero_to_fp32.py",
    ]


@pytest.mark.parametrize("name", ["manifest.json", "LATEST", "zero_to_fp32.py"])
def test_an_export_takes_no_name_of_a_checkpoints_own(
    name: str, engine: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name"):
        engine.save_16bit_model(tmp_path, name)


def test_an_export_into_a_checkpoint_is_refused(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path, "t")
    with pytest.raises(CheckpointError, match="is a checkpoint"):
        engine.save_16bit_model(tmp_path / "t")
    assert engine.load_checkpoint(tmp_path)[0] is not None


# Two jobs, and pruning.


def test_a_second_job_that_saves_here_at_the_same_time_is_refused(
    engine: Any, tmp_path: Path
) -> None:
    engine.save_checkpoint(tmp_path, "a")
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        put(tmp_path, {f".tmp-theirs-{NONCE}": {}})
        with pytest.raises(CheckpointError, match="another job is saving"):
            engine.save_checkpoint(tmp_path, "b")
        assert (tmp_path / f".tmp-theirs-{NONCE}").exists()
    engine.save_checkpoint(tmp_path, "b")
    assert tags(tmp_path) == {"a", "b"} and not list(tmp_path.glob(".tmp-*"))


def test_pruning_spares_what_latest_names_and_what_was_loaded(engine: Any, tmp_path: Path) -> None:
    for tag in ("a", "b", "c", "d"):
        engine.save_checkpoint(tmp_path, tag, save_latest=tag == "b")
    other = fresh(zerort={"checkpoint": {"keep_last": 2}})
    other.load_checkpoint(tmp_path, "a")
    other.save_checkpoint(tmp_path, "e", save_latest=False)
    assert tags(tmp_path) == {"a", "b", "d", "e"}
    other.save_checkpoint(tmp_path, "f", keep_last=1)
    assert tags(tmp_path) == {"a", "f"}


def test_two_runs_in_one_folder_prune_their_own_checkpoints_and_say_so(
    engine: Any, tmp_path: Path, caplog: Any
) -> None:
    other = fresh()
    for number in (1, 2, 3):
        engine.save_checkpoint(tmp_path, f"a{number}", keep_last=2)
        with caplog.at_level(logging.DEBUG, "zerort"):
            other.save_checkpoint(tmp_path, f"b{number}", keep_last=1)
    assert tags(tmp_path) == {"a2", "a3", "b3"}
    lines = [record.getMessage() for record in caplog.records]
    spared = [line for line in lines if "leaves the checkpoints alone that other runs" in line]
    assert [line.split()[-1] for line in spared] == ["a1", "b1"]  # each run once
    deleted = [r for r in caplog.records if "keep_last=1: deleted" in r.getMessage()]
    assert [r.getMessage().split()[-1] for r in deleted] == ["b1", "b2"]
    assert {record.levelno for record in deleted} == {logging.DEBUG}


def test_what_a_smaller_keep_last_lets_go_at_once_is_said(
    engine: Any, tmp_path: Path, caplog: Any
) -> None:
    for tag in ("a", "b", "c"):
        engine.save_checkpoint(tmp_path, tag)
    with caplog.at_level(logging.INFO, "zerort"):
        engine.save_checkpoint(tmp_path, "d", keep_last=1)
    (said,) = [r.getMessage() for r in caplog.records if "keep_last=1" in r.getMessage()]
    assert "deleted 3 of this run's checkpoints" in said and said.endswith(": c, b, a")


def test_a_run_that_was_restarted_prunes_what_it_saved_before(engine: Any, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path, "a1")
    ids = [manifest_of(tmp_path / "a1")["run"]]
    for number in (2, 3, 4):
        restarted = fresh()
        restarted.load_checkpoint(tmp_path)
        restarted.save_checkpoint(tmp_path, f"a{number}")
        found = manifest_of(tmp_path / f"a{number}")
        assert found["ancestors"] == ids[::-1] and found["run"] not in ids
        ids.append(found["run"])
    branch = fresh()
    branch.load_checkpoint(tmp_path, "a2")
    branch.save_checkpoint(tmp_path, "b", save_latest=False, keep_last=1)
    # a1 is its ancestor's and goes; a2 was loaded; a3 and a4 are those of the other branch.
    assert tags(tmp_path) == {"a2", "a3", "a4", "b"}


def test_a_checkpoint_that_holds_files_of_others_is_not_pruned(
    engine: Any, tmp_path: Path, caplog: Any
) -> None:
    engine.save_checkpoint(tmp_path, "a")
    (tmp_path / "a" / "notes.txt").write_text("work")
    engine.save_checkpoint(tmp_path, "b", keep_last=1)
    assert (tmp_path / "a" / "notes.txt").exists() and "notes.txt" in caplog.text
    (tmp_path / "a" / "notes.txt").rename(tmp_path / "a" / ".notes.txt")
    engine.save_checkpoint(tmp_path, "c", keep_last=1)
    assert tags(tmp_path) == {"c"}


def test_what_could_not_be_loaded_does_not_replace_what_could(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.save_checkpoint(tmp_path, "t")
    before = shutil.copytree(tmp_path / "t", tmp_path / ".before")
    for key, value in (("n", 10**4300), ("text", "\ud800")):
        for where in (engine.optimizer.param_groups[0], {}):
            where[key] = value
            with pytest.raises(CheckpointError, match=key):
                state = where if where is not engine.optimizer.param_groups[0] else {}
                engine.save_checkpoint(tmp_path, "t", client_state=state, overwrite=True)
            del where[key]
    # Whatever else a reader would refuse: the manifest is read again before it counts.
    monkeypatch.setattr("zerort.checkpoint.encoding._LONGEST", 10**9000)
    with pytest.raises(CheckpointError, match=r"manifest\.json could not be read again"):
        engine.save_checkpoint(tmp_path, "t", client_state={"n": 10**4300}, overwrite=True)
    for path in before.iterdir():
        assert path.read_bytes() == (tmp_path / "t" / path.name).read_bytes()
    assert engine.load_checkpoint(tmp_path)[0] is not None
