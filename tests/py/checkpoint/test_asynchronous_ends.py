"""What becomes of a save beside training when the engine ends, a peer fails, or another engine
saves into the same folder.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from test_asynchronous import Held, alone, step, trained

import ranks
from disks import Until
from zerort.checkpoint import problems
from zerort.errors import CheckpointError, CommError
from zerort.mesh import Consensus


def let_down(rank: int, world: int, folder: str) -> str:
    """Rank 1 fails in code of its own, and what is written waits until rank 0 has heard of it."""
    heard = Path(folder) / "heard"
    engine = trained(1)
    step(engine, rank, world, 0)
    engine._checkpoints.disk = Until(heard)
    engine.save_checkpoint(folder, "one", asynchronous=True)
    try:
        if rank == 1:
            raise ValueError("the culprit")
        step(engine, rank, world, 1)
    except (ValueError, CommError) as error:
        if rank == 0:
            heard.touch()
        engine.destroy()
        engine.destroy()
        return str(error)
    return "nothing was raised"


def share(rank: int, world: int, folder: str) -> list[str]:
    """Two engines, of which one saves while the other's save is under way."""
    one, other = trained(1), trained(1)
    for engine in (one, other):
        step(engine, rank, world, 0)
    said = []

    def save(tag: str) -> Held:
        one._checkpoints.disk = disk = Held()
        one.save_checkpoint(folder, tag, asynchronous=True, keep_last=1)
        assert disk.came.wait(30)
        return disk

    disk = save("one-1")
    assert other.load_checkpoint(folder) == (None, {})  # nothing is listed
    other.save_checkpoint(folder, "other-1", asynchronous=True, keep_last=1)
    disk.go.set()
    other.wait_for_checkpoint()
    disk = save("one-2")
    other.save_checkpoint(folder, "one-2", asynchronous=True)
    disk.go.set()
    try:
        other.wait_for_checkpoint()
    except CheckpointError as error:
        said.append(str(error))
    disk = save("one-3")
    disk.go.set()
    other.save_checkpoint(folder, "other-2", keep_last=1)
    for engine in (one, other):
        engine.destroy()
    return said


def test_peers_of_a_rank_that_fails_hear_of_it_before_its_save_is_written(tmp_path: Path) -> None:
    ours, theirs = ranks.shared(2, let_down, str(tmp_path))
    assert theirs == "the culprit"
    assert "rank 1" in ours and "ValueError: the culprit" in ours
    assert problems(tmp_path, "one") == []


def test_engines_of_one_job_save_into_one_folder_one_behind_the_other(tmp_path: Path) -> None:
    ours, theirs = ranks.shared(2, share, str(tmp_path))
    assert ours == theirs
    assert len(ours) == 1 and "one-2 was not saved" in ours[0] and "exists already" in ours[0]
    # each prunes its own
    assert sorted(path.parent.name for path in tmp_path.glob("*/manifest.json")) == [
        "one-3",
        "other-2",
    ]
    assert problems(tmp_path, "one-3") == problems(tmp_path, "other-2") == []


def test_ctrl_c_while_destroy_waits_for_a_save_leaves_it_to_its_end(tmp_path: Path) -> None:
    engine = alone(disk := Held())
    engine.save_checkpoint(tmp_path, "one", asynchronous=True)
    writer = engine._checkpoints.background._writer
    assert disk.came.wait(30)
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        engine.destroy()
    interrupt.join()
    engine.destroy()  # has nothing left to give back, and does not wait
    assert not (tmp_path / "one" / "manifest.json").exists()
    disk.go.set()
    writer.join(30)
    assert problems(tmp_path, "one") == []


class Gone:
    """Ranks of which one has died."""

    rank, world = 0, 2

    def gather_objects(self, value: Any) -> list[Any]:
        raise CommError("rank 1 was killed")


def test_a_failure_that_peers_cannot_be_told_of_is_raised_by_destroy(tmp_path: Path) -> None:
    engine = alone(disk := Held(fails=True))
    engine.save_checkpoint(tmp_path, "one", asynchronous=True)
    disk.go.set()
    engine._checkpoints.background._ranks = Consensus(Gone(), CheckpointError, alike=True)
    with pytest.raises(CommError, match="rank 1 was killed"):
        engine.wait_for_checkpoint()
    with pytest.raises(CheckpointError, match=r"one was not saved.*No space left"):
        engine.destroy()
