"""What the ranks know after a vote."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ranks
import zerort
from catching import assert_told, caught
from training import keep
from zerort.device.cpu import Cpu
from zerort.errors import CommError
from zerort.mesh import connect
from zerort.step import vote as voting
from zerort.step.vote import Ballot, Verdict, vote

pytestmark = pytest.mark.timeout(60)
NOBODY: tuple[int, ...] = ()


def _vote(rank: int, world: int, groups: dict[str, Any] | None) -> Verdict:
    mesh = connect(timedelta(seconds=30), torch.device("cpu"), groups)
    buckets = [SimpleNamespace(squares=9.0), SimpleNamespace(squares=torch.tensor(16.0))]
    flat: Any = SimpleNamespace(trained=buckets)
    verdict = vote(mesh, flat, Ballot(unreduced=rank, poisoned=rank == 1, fingerprint=2**63 + 1))
    mesh.close()
    return verdict


def test_the_norm_is_over_the_shards_of_all_ranks() -> None:
    for verdict in ranks.run(2, _vote, None):
        assert verdict.norm == pytest.approx(50**0.5, rel=1e-6)
        assert (verdict.unreduced, verdict.poisoned, verdict.mismatched) == (1, (1,), NOBODY)


def test_what_several_ranks_hold_alike_enters_the_norm_once() -> None:
    replicas = {"shard": [[0], [1]], "replica": [[0, 1]]}
    for verdict in ranks.run(2, _vote, replicas):
        assert verdict.norm == 5.0


def _host_ahead(rank: int, world: int) -> list[object]:
    """Rank 1 goes behind its second backward; the error of rank 0's step, and what it asked the
    device for before. Of the step before: how many small all-reduces it took.
    """
    Cpu.blocks = False  # type: ignore[misc]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = zerort.initialize(model=torch.nn.Linear(8, 8), config=config)
    keep(engine)
    control = engine._parts.mesh.control
    reduce, read, seen = control.all_reduce, voting._total, list[str]()
    control.all_reduce = lambda values: (seen.append("ranks"), reduce(values))  # type: ignore[misc]
    voting._total = lambda squares: (seen.append("device"), read(squares))[1]  # type: ignore[misc]
    engine.backward(engine(torch.ones(4, 8)).square().mean())
    engine.step()
    good, seen[:] = list(seen), []
    engine.backward(engine(torch.ones(4, 8)).square().mean())
    if rank == 1:
        os._exit(3)
    time.sleep(0.5)
    error = caught(engine.step)
    return [error, good, seen]


def test_a_host_that_runs_ahead_asks_for_all_ranks_before_it_waits_for_the_device() -> None:
    survivor, gone = ranks.attempt(2, _host_ahead)
    assert gone == ranks.Died(3)
    assert isinstance(survivor, ranks.Returned), survivor
    error, good, seen = survivor.value
    assert good == ["ranks", "device", "ranks"]
    assert seen == ["ranks"]
    assert_told(error, CommError, "rank 1")


def _ctrl_c_while_ranks_come(rank: int, world: int) -> list[str]:
    """Rank 1 is interrupted in the round before the vote; then both train."""
    Cpu.blocks = False  # type: ignore[misc]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = zerort.initialize(model=torch.nn.Linear(8, 8), config=config)
    keep(engine)
    control = engine._parts.mesh.control
    reduce = control.all_reduce

    def interrupted(values: torch.Tensor) -> None:
        control.all_reduce = reduce  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGINT)
        reduce(values)

    if rank == 1:
        control.all_reduce = interrupted  # type: ignore[method-assign]
    found = []
    for _ in range(2):
        engine.backward(engine(torch.ones(4, 8)).square().mean())
        try:
            engine.step()
            found.append(f"{engine.was_step_applied()}")
        except (KeyboardInterrupt, zerort.StepError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_ctrl_c_while_ranks_come_reaches_the_vote() -> None:
    innocent, interrupted = ranks.run(2, _ctrl_c_while_ranks_come)
    assert interrupted == ["KeyboardInterrupt: ", "True"]
    assert "rank 1: KeyboardInterrupt before the vote" in innocent[0]
    assert innocent[1] == "True"
