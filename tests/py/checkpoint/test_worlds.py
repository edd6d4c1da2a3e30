"""Checkpoints on several ranks and of several jobs: what each has of its own, what moves to other
worlds, refusals.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_api import OPTIMIZERS, Everything, everything, step

import ranks
import zerort
from catching import caught
from saved import (
    Net,
    adamw,
    assert_equal,
    config_of,
    contents,
    engine_of,
    manifest_of,
    train,
    weights,
)
from training import keep
from zerort.checkpoint import problems

NOBODY = 65534


# What each rank has of its own.


def drawn() -> tuple[list[float], float, float]:
    return torch.rand(3).tolist(), random.random(), float(np.random.rand())


def go_on(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Saves in the middle of an epoch; what comes next from the random numbers and the data, here
    and resumed.
    """

    def made() -> Any:
        data = [torch.full((10,), float(i)) for i in range(16)]
        return zerort.initialize(
            model=Net(), optimizer=adamw, training_data=data, config=config_of(2)
        )

    (one, _, loader, _), (other, _, resumed, _) = made(), made()
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    batches = iter(loader)
    seen = [float(next(batches)[0, 0]) for _ in range(3)]
    one.save_checkpoint(folder)
    numbers, rest = drawn(), [float(batch[0, 0]) for batch in batches]
    other.load_checkpoint(folder)
    return {
        "seen": seen,
        "here": (numbers, rest),
        "resumed": (drawn(), [float(batch[0, 0]) for batch in resumed]),
    }


def test_each_rank_goes_on_with_its_own_random_numbers_and_data(tmp_path: Path) -> None:
    told = ranks.shared(2, go_on, str(tmp_path))
    for rank in told:
        assert rank["resumed"] == rank["here"]
    assert told[0]["here"][0] != told[1]["here"][0]
    assert sorted(item for rank in told for item in rank["seen"] + rank["here"][1]) == list(
        range(16)
    )


# To another world.


def in_the_middle_of_an_epoch(rank: int, world: int, folder: str, resume: bool) -> dict[str, Any]:
    """The samples that this rank sees before it saves, or after it has loaded; and what is said."""
    data = [torch.full((10,), float(i)) for i in range(24)]
    engine, _, loader, _ = zerort.initialize(
        model=Net(), optimizer=adamw, training_data=data, config=config_of(2)
    )
    if resume:
        path, client_state = engine.load_checkpoint(folder)
        told = (Path(path).name, client_state, engine.last_load.not_restored, loader.epoch)
        return {"told": told, "seen": [float(x) for batch in loader for x in batch[:, 0]]}
    for _ in loader:  # a whole epoch
        pass
    batches = iter(loader)
    seen = [float(next(batches)[0, 0]) for _ in range(12 // world)]
    engine.save_checkpoint(folder, "t", client_state={"mine": 1})
    return {"seen": seen}


@pytest.mark.parametrize(("saved", "loads"), [(2, 1), (1, 3), (2, 2)])
def test_the_place_in_the_data_fits_any_number_of_ranks_and_random_numbers_do_not(
    saved: int, loads: int, tmp_path: Path
) -> None:
    before = ranks.shared(saved, in_the_middle_of_an_epoch, str(tmp_path), False)
    after = ranks.shared(loads, in_the_middle_of_an_epoch, str(tmp_path), True)
    seen = [sample for rank in before + after for sample in rank["seen"]]
    assert sorted(seen) == list(range(24))  # each once, in the second epoch
    for rank in after:
        tag, client_state, reasons, epoch = rank["told"]
        assert (tag, client_state, epoch) == ("t", {"mine": 1}, 1)
        expected = (
            f"random numbers are not restored: each rank has its own, {saved} saved, {loads} load"
        )
        assert reasons == (() if saved == loads else (expected,))


def save_each_optimizer(rank: int, world: int, folder: str) -> None:
    for name, optimizer in OPTIMIZERS.items():
        engine = engine_of(config_of(stage_of(name, 2)), optimizer=optimizer)
        train(engine, rank, world, range(3))
        engine.save_checkpoint(folder, name.replace(" ", "-"))
        keep(engine)


def move_each_optimizer(rank: int, world: int, source: str, target: str, stage: int) -> None:
    for name, optimizer in OPTIMIZERS.items():
        engine = engine_of(config_of(stage_of(name, stage), bucket=700), optimizer=optimizer)
        engine.load_checkpoint(source, name.replace(" ", "-"))
        engine.module.norm.requires_grad_(False)  # as it was
        engine.save_checkpoint(target, name.replace(" ", "-"))
        keep(engine)


def stage_of(name: str, stage: int) -> int:
    return 0 if name == "Adafactor" else stage


def test_the_state_of_any_optimizer_moves_to_other_worlds_and_back(tmp_path: Path) -> None:
    two, three, one = (str(tmp_path / name) for name in ("two", "three", "one"))
    ranks.shared(2, save_each_optimizer, two)
    ranks.shared(3, move_each_optimizer, two, three, 1)
    ranks.shared(1, move_each_optimizer, three, one, 0)
    for name in OPTIMIZERS:
        tag = name.replace(" ", "-")
        saved = contents(Path(two) / tag)
        assert_equal(contents(Path(three) / tag), saved)
        assert_equal(contents(Path(one) / tag), saved)
        groups = [manifest_of(Path(folder) / tag)["optimizer"] for folder in (two, one)]
        assert groups[0] == groups[1]


def move_everything(rank: int, world: int, folder: str, source: str | None, target: str) -> Any:
    engine = everything(0 if source is None else 1)
    if source is None:
        step(engine)
    else:
        engine.load_checkpoint(folder, source)
    engine.save_checkpoint(folder, target)
    tied = engine.module.head.weight is engine.module.embed.weight
    return weights(engine), engine.module.seen, tied


def test_tied_and_frozen_weights_buffers_and_odd_shapes_move_to_other_worlds(
    tmp_path: Path,
) -> None:
    two = ranks.shared(2, move_everything, str(tmp_path), None, "two")
    three = ranks.shared(3, move_everything, str(tmp_path), "two", "three")
    one = ranks.shared(1, move_everything, str(tmp_path), "three", "one")
    for values, seen, tied in (*two, *three, *one):
        assert_equal(values, two[0][0])
        assert (seen, tied) == (1, True)
    assert_equal(contents(tmp_path / "one"), contents(tmp_path / "two"))
    assert torch.equal(one[0][0]["norm.running_mean"], two[0][0]["norm.running_mean"])
    assert not torch.equal(one[0][0]["norm.running_mean"], Everything().norm.running_mean)


# Refusals.


def load_what_one_rank_finds_damaged(rank: int, world: int, folder: str) -> tuple[str, bool]:
    engine = engine_of(config_of(2))
    train(engine, rank, world, range(1))
    engine.save_checkpoint(folder, "t")
    train(engine, rank, world, range(1, 2))
    if rank == 0:
        path = Path(folder) / "t" / "rank_1.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    engine.zero_grad()
    before = weights(engine)
    error = caught(lambda: engine.load_checkpoint(folder, "t"))
    unchanged = all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    return repr(error), unchanged and engine.global_steps == 2


def test_damage_that_one_rank_finds_changes_nothing_on_any(tmp_path: Path) -> None:
    one, other = ranks.shared(2, load_what_one_rank_finds_damaged, str(tmp_path))
    assert one == other and one[1]
    assert "rank_1.safetensors is damaged" in one[0] and "CheckpointError" in one[0]


def save_where_nobody_may(rank: int, world: int, folder: str) -> list[str]:
    engine = engine_of(config_of(2))
    engine.save_checkpoint(folder, "old")
    if rank == 0:
        os.chmod(folder, 0o555)
    if os.geteuid() == 0:  # who may write anywhere
        os.seteuid(NOBODY)
    told = []
    for call in (
        lambda: engine.save_checkpoint(folder, "new"),
        lambda: engine.save_checkpoint(Path(folder) / "below", "new"),
        lambda: engine.save_16bit_model(folder),
        lambda: engine.load_checkpoint(folder),
    ):
        told.append(repr(caught(call)))
    return told


def test_a_folder_that_is_read_only_is_a_named_error_and_loads() -> None:
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        folder = base / "saved"
        folder.mkdir(mode=0o755)
        one, other = ranks.shared(2, save_where_nobody_may, str(folder))
        assert one == other
        for message in one[:3]:
            assert (
                "CheckpointError" in message
                and "Permission denied" in message
                and "saved" in message
            )
        assert one[3] == "None"
        folder.chmod(0o755)
        assert sorted(os.listdir(folder)) == [".lock", "latest", "old", "zero_to_fp32.py"]
        assert problems(folder, "old") == []
    finally:
        shutil.rmtree(base)


def save_again_and_again(rank: int, world: int, folder: str, job: str, other: str) -> list[str]:
    engine = engine_of(config_of(1))
    train(engine, rank, world, range(1))
    Path(folder, f".{job}").touch()
    while not Path(folder, f".{other}").exists():
        time.sleep(0.001)
    return [
        repr(caught(lambda n=n: engine.save_checkpoint(folder, f"{job}{n}"))) for n in range(40)
    ]


def test_two_jobs_that_save_into_one_folder_save_or_are_refused(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        jobs = list(
            pool.map(
                lambda job: ranks.run(1, save_again_and_again, str(tmp_path), *job)[0],
                ("ab", "ba"),
            )
        )
    for told, job in zip(jobs, ("a", "b"), strict=True):
        for number, message in enumerate(told):
            saved = (tmp_path / f"{job}{number}").exists()
            assert saved == (message == "None")
            assert saved or "another job is saving" in message
            assert not saved or problems(tmp_path, f"{job}{number}") == []
    assert any(message != "None" for told in jobs for message in told), "they never met"
    assert not list(tmp_path.glob(".tmp-*"))
    engine = engine_of(config_of(1))
    assert engine.load_checkpoint(tmp_path)[0] is not None


# How it is done.


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = everything(0), everything(1)
    step(one)
    one.save_checkpoint(tmp_path, client_state={"seen": torch.ones(3)})

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("something was unpickled")

    made, dumps, loads = set[bytes](), pickle.dumps, pickle.loads

    def remember(value: Any) -> bytes:
        made.add(data := dumps(value))
        return data

    def unpickle(data: bytes) -> Any:
        assert data in made, "something was unpickled that this process has not pickled"
        return loads(data)

    for module, names in ((pickle, ("load", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "dumps", remember)  # ranks exchange their own objects so
    monkeypatch.setattr(pickle, "loads", unpickle)
    assert other.load_checkpoint(tmp_path)[0] is not None
    assert_equal(weights(other), weights(one))


def test_a_save_may_run_on_a_thread_of_its_own(tmp_path: Path) -> None:
    engine = engine_of(config_of(1))
    train(engine, 0, 1, range(1))
    thread = threading.Thread(target=engine.save_checkpoint, args=(tmp_path, "t"))
    thread.start()
    thread.join()
    other = engine_of(config_of(1))
    assert other.load_checkpoint(tmp_path)[0] is not None
    assert_equal(weights(other), weights(engine))
