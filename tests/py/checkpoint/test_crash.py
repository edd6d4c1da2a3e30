"""Crashes: at every operation of a save, whatever the disk has kept, `latest` loads, and it is the
old or the new.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ranks
from crashes import CrashState, Failing, Operation, Recorder, snapshot, states
from saved import config_of, engine_of, weights
from zerort.checkpoint import problems
from zerort.errors import CheckpointError
from zerort.optim import Lion


def tiny_engine() -> Any:
    """One bucket and one kind of state, so that a save has few operations."""
    torch.manual_seed(0)
    return engine_of(config_of(1), nn.Linear(4, 4), lambda params: Lion(params, lr=0.25))


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


def save_old(rank: int, world: int, folder: str, tag: str) -> None:
    engine = tiny_engine()
    step(engine)
    engine.save_checkpoint(folder, tag)


def save(engine: Any, folder: str, tag: str, *, beside: bool, **options: Any) -> None:
    """A whole save; `beside` training, with a step meanwhile that is not to be in it."""
    engine.save_checkpoint(folder, tag, asynchronous=beside, **options)
    if beside:
        step(engine)
        engine.wait_for_checkpoint()


def record(
    rank: int, world: int, folder: str, tag: str, options: dict[str, Any], beside: bool = False
) -> list[Operation]:
    engine = tiny_engine()
    engine.load_checkpoint(folder)
    step(engine)
    engine._checkpoints._loaded.clear()  # so that keep_last may delete it
    engine._checkpoints.disk = disk = Recorder(Path(folder))
    save(engine, folder, tag, beside=beside, **options)
    return disk.operations


def interleaved(of_rank_0: list[Operation], of_rank_1: list[Operation], at: int) -> list[Operation]:
    """Rank 1 writes at some time between the temporary folder and the manifest: behind operation
    `at` of rank 0.
    """
    script = next(
        i
        for i, op in enumerate(of_rank_0)
        if op.name == "create" and op.paths[0].endswith("zero_to_fp32.py")
    )
    assert 0 < at <= script
    return [*of_rank_0[:at], *of_rank_1, *of_rank_0[at:]]


def weights_after() -> dict[int, dict[str, torch.Tensor]]:
    """The right weights, by the number of steps."""
    engine, found = tiny_engine(), {}
    for count in (1, 2, 3):
        step(engine)
        found[count] = weights(engine)
    engine.destroy()
    return found


def check(
    state: CrashState, folder: Path, engine: Any, expected: dict[int, dict[str, torch.Tensor]]
) -> int:
    """Loads what `latest` names and verifies all that has a name; returns the step, 1 for the old,
    2 for the new.
    """
    folder.mkdir()
    state.write(folder)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None, f"after operation {state.after}: `latest` is gone"
    for tag in (
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    ):
        assert problems(folder, tag) == [], (
            f"after operation {state.after}: {tag} is listed and not complete"
        )
    count = int(engine.global_steps)
    for name, value in weights(engine).items():
        assert torch.equal(value, expected[count][name]), (
            f"after operation {state.after}: {name} is mixed"
        )
    return count


CASES = {
    "a new tag": ("old", "new", {}),
    "the same tag again": ("best", "best", {"overwrite": True}),
    "a new tag that lets the old one go": ("old", "new", {"keep_last": 1}),
}


WAYS = pytest.mark.parametrize(
    "beside", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["at once", "beside"]
)


@WAYS
@pytest.mark.parametrize("case", CASES)
def test_every_crash_leaves_the_old_checkpoint_or_the_new_one(
    case: str, beside: bool, tmp_path: Path
) -> None:
    old, new, options = CASES[case]
    folder = tmp_path / "real"
    folder.mkdir()
    ranks.run(2, save_old, str(folder), old)
    before = snapshot(folder)
    recorded = ranks.run(2, record, str(folder), new, options, beside)
    engine, expected = tiny_engine(), weights_after()
    seen: set[int] = set()
    for at in (1, 6):
        operations = interleaved(*recorded, at)
        found = []
        for state in states(before, operations, seen, seed=at):
            found.append(
                (state.after, check(state, tmp_path / f"{at}-{len(found)}", engine, expected))
            )
        assert {count for _, count in found} == {1, 2}
        assert all(count == 2 for after, count in found if after == len(operations)), (
            "a save that returned was lost"
        )
    engine.destroy()
    assert len(seen) >= 600, f"only {len(seen)} states"


def test_a_save_behind_one_that_died_unsynced_loses_nothing_either(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    ranks.run(2, save_old, str(first), "best")
    before = snapshot(first)
    recorded = interleaved(*ranks.run(2, record, str(first), "best", {"overwrite": True}), 6)
    died = next(i for i, operation in enumerate(recorded) if operation.name == "exchange") + 1
    second.mkdir()
    whole = next(
        state for state in states(before, recorded[:died], set(), seed=0) if state.after == died
    )
    whole.write(second)
    again = ranks.run(2, record, str(second), "best", {"overwrite": True})
    # Rank 1 writes once rank 0 has swept and made the new folder.
    at = 1 + next(i for i, operation in enumerate(again[0]) if operation.name == "make_folder")
    operations = recorded[:died] + interleaved(*again, at)
    engine, expected, seen, found = tiny_engine(), weights_after(), set[int](), []
    # what a crash during the first save leaves is seen where it is the only one
    for state in states(before, operations, seen, seed=1, since=died):
        found.append((state.after, check(state, tmp_path / str(len(found)), engine, expected)))
    assert {count for _, count in found} == {1, 2, 3}
    assert all(count == 3 for after, count in found if after == len(operations)), (
        "a save that returned was lost"
    )
    engine.destroy()
    assert len(seen) >= 600, f"only {len(seen)} states"


def without_script(rank: int, folder: str) -> None:
    """So that the next save puts it there, which is a part of a save that may fail too."""
    if rank == 0:
        (Path(folder) / "zero_to_fp32.py").unlink(missing_ok=True)


def count_operations(rank: int, world: int, folder: str) -> list[str]:
    engine = tiny_engine()
    engine._checkpoints.disk = disk = Failing(None)
    engine.save_checkpoint(folder, "counted")
    return disk.seen


def fail_at_each(
    rank: int, world: int, folder: str, failing_rank: int, how: str, count: int, beside: bool
) -> list[str]:
    """Fails at one operation after another; returns what this rank raised, or "saved"."""
    engine, told = tiny_engine(), []
    step(engine)
    step(engine)
    for at in range(count):
        without_script(rank, folder)
        engine._checkpoints.disk = Failing(at if rank == failing_rank else None, how)
        try:
            save(engine, folder, f"new{at}", beside=beside)
            told.append("saved")
        except CheckpointError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize(
    ("how", "beside"),
    [
        ("raise", False),
        ("full", False),
        ("full", True),
        pytest.param("raise", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("failing_rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_failure_at_any_operation_is_the_same_error_on_all_ranks(
    how: str, failing_rank: int, beside: bool, tmp_path: Path
) -> None:
    ranks.run(2, save_old, str(tmp_path), "old")
    seen = ranks.run(2, count_operations, str(tmp_path / "other"))[failing_rank]
    # Making the folder `other` itself takes two operations, which are not part of a save into an
    # existing folder.
    seen = seen[2:] if failing_rank == 0 else seen
    told = ranks.run(2, fail_at_each, str(tmp_path), failing_rank, how, len(seen), beside)
    assert told[0] == told[1]
    reason = "the failpoint" if how == "raise" else "No space left on device"
    for at, message in enumerate(told[0]):
        # The lock is closed after the checkpoint is complete, and a failure there loses nothing.
        assert reason in message or (seen[at] == "close" and message == "saved"), (
            at,
            seen[at],
            message,
        )
    engine = tiny_engine()
    assert engine.load_checkpoint(tmp_path)[0] is not None
    for path in tmp_path.iterdir():
        if path.name.startswith("new"):
            assert problems(tmp_path, path.name) == []
    assert leftovers(tmp_path) == []


def save_and_die(
    rank: int, world: int, folder: str, failing_rank: int, at: int, beside: bool
) -> None:
    engine = tiny_engine()
    engine.load_checkpoint(folder)
    step(engine)
    without_script(rank, folder)
    engine._checkpoints.disk = Failing(at if rank == failing_rank else None, "kill")
    save(engine, folder, "new", beside=beside)


@WAYS
@pytest.mark.parametrize("failing_rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_at_any_operation_leaves_a_checkpoint_that_loads(
    failing_rank: int, beside: bool, tmp_path: Path
) -> None:
    seen = ranks.run(2, count_operations, str(tmp_path / "other"))[failing_rank]
    count = len(seen) - 2 if failing_rank == 0 else len(seen)
    for at in range(count):
        folder = tmp_path / str(at)
        ranks.run(2, save_old, str(folder), "old") if at == 0 else _copy(tmp_path / "0-old", folder)
        if at == 0:
            _copy(folder, tmp_path / "0-old")
        outcomes = ranks.attempt(2, save_and_die, str(folder), failing_rank, at, beside, grace=10)
        killed = outcomes[failing_rank]
        assert isinstance(killed, ranks.Died) and killed.exitcode == -9, (at, seen[at], killed)
        survivor = outcomes[1 - failing_rank]
        assert isinstance(survivor, (ranks.Raised, ranks.Returned)), (at, survivor)
        engine = tiny_engine()
        path, _ = engine.load_checkpoint(folder)
        assert path is not None and problems(folder, Path(path).name) == []
        assert engine.global_steps in (1, 2)
        engine.save_checkpoint(folder, "after")
        assert leftovers(folder) == []
        engine.destroy()


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    CrashState(0, snapshot(source)).write(target)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "zerort")
