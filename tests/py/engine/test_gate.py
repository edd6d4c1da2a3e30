"""Collectives of the caller's own beside an engine: a rank that waits in one hears of another's
failure, though that one's process goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ranks
from catching import caught
from models import Terms
from terms import engine_over_terms, step_with
from training import at_stage
from zerort.errors import CommError

pytestmark = pytest.mark.timeout(120)
every_stage = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])

CALL = "a log of Lightning's"
TIMEOUT = 25.0


class Meets(Terms):
    """Does something within its forward."""

    within: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, *coefficients: Any) -> torch.Tensor:
        outputs: torch.Tensor = super().forward(*coefficients)
        self.within()
        return outputs


def _gated(stage: int) -> Any:
    sharded = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": sharded} if stage == 3 else at_stage(stage)
    engine = engine_over_terms({**config, "zerort": {"timeout": TIMEOUT}}, model=Meets())
    engine.open_gate(timedelta(seconds=TIMEOUT))
    step_with(engine, 1.0, 2.0)
    return engine


def _log(engine: Any) -> float:
    """A collective on the default group, as Lightning makes it."""
    engine.meet(CALL)
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return ones.item()


def _raise(where: str) -> None:
    raise KeyError(where)


def _step(engine: Any, where: str, *, fails: bool) -> None:
    """A step with a log at this place, where a rank may fail instead."""

    def here() -> None:
        _raise(where) if fails else _log(engine)

    if where == "between":
        here()
    engine.module.within = here if where == "forward" else lambda: None
    loss = engine(1.0, 2.0)
    if where == "backward" and fails:
        loss.register_hook(lambda _: here())
    engine.backward(loss)
    if where == "backward":
        here()
    engine.step()


def _failed(rank: int, world: int, stage: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for where in ("between", "forward", "backward"):
        engine, begun = _gated(stage), time.monotonic()
        try:
            _step(engine, where, fails=rank == 1)
        except Exception as error:
            found[where] = f"{type(error).__name__}: {error}"
            engine.destroy()
        found[f"seconds of {where}"] = time.monotonic() - begun
        dist.barrier()  # the default group is as it was
    return found


@every_stage
def test_who_waits_hears_the_reason_of_a_rank_that_goes_on(stage: int) -> None:
    waits, fails = ranks.shared(2, _failed, stage)
    for where in ("between", "forward", "backward"):
        assert fails[where] == f"KeyError: '{where}'", "its own error, and no other"
        assert waits[where].startswith("CommError: rank 0: "), where
        assert f"KeyError: '{where}'" in waits[where]
        for found in (waits, fails):
            assert found[f"seconds of {where}"] < 8.0


def _alike(rank: int, world: int, stage: int) -> list[Any]:
    """Before and behind an exception that all ranks raise, and before and behind one of rank 1."""
    engine = _gated(stage)
    engine.module.within = lambda: _raise("all")
    assert isinstance(caught(lambda: engine(1.0, 2.0)), KeyError)
    caught(engine.step)
    engine.announce(KeyError("all"))
    found = [str(caught(lambda: _log(engine))) for _ in range(4)]
    if rank == 1:
        engine.announce(KeyError("one"))
    try:
        _log(engine)
    except CommError as error:
        engine.destroy()
        return [*found, str(error)]
    return found


@every_stage
def test_each_failure_is_heard_once_and_ranks_that_stay_meet_again(stage: int) -> None:
    hears, fails = ranks.shared(2, _alike, stage)
    for found in (hears, fails):
        assert found[2:4] == ["None", "None"]
    assert hears[4].endswith("rank 1 has failed: KeyError: 'one'")
    assert "rank 0 has failed: CommError: " in fails[4], "nobody waits for who has left"


def _as_ever(rank: int, world: int, stage: int) -> list[float]:
    engine = _gated(stage)
    sums = []
    engine.module.within = lambda: sums.append(_log(engine))
    for _ in range(2):
        loss = engine(1.0, 2.0)
        sums.append(_log(engine))
        engine.backward(loss)
        sums.append(_log(engine))
        engine.step()
    engine.destroy()
    return [*sums, _log(engine)]


@every_stage
def test_where_none_fails_collectives_pair_at_every_place(stage: int) -> None:
    assert ranks.shared(2, _as_ever, stage) == [[2.0] * 7] * 2


def _uneven(rank: int, world: int) -> tuple[float, str]:
    engine = _gated(3)
    with torch.no_grad():
        for _ in range(1 + 2 * rank):
            engine(1.0, 2.0)
    together = _log(engine)
    step_with(engine, 1.0, 2.0)
    call = (lambda: _log(engine)) if rank == 0 else (lambda: engine(1.0, 2.0))
    return together, f"{caught(call)!r}"


def test_at_stage_3_evaluations_may_differ_in_number_and_training_is_told_at_once() -> None:
    for together, told in ranks.shared(2, _uneven):
        assert together == 2.0
        assert "rank 0 is between passes" in told and "rank 1 begins a training forward" in told


def _apart(rank: int, world: int) -> str:
    engine = _gated(2)
    calls = (CALL, "a barrier of Lightning's")
    return str(caught(lambda: engine.meet(calls[rank])))


def test_ranks_that_come_to_different_collectives_are_told_which() -> None:
    for rank, told in enumerate(ranks.shared(2, _apart)):
        assert told.startswith(f"rank {rank}: ")
        assert f"rank 0 comes to {CALL}; rank 1 comes to a barrier of Lightning's" in told


def _alone(rank: int, world: int) -> None:
    engine = engine_over_terms(at_stage(2))
    engine.open_gate(timedelta(seconds=1))
    engine.meet(CALL)
    step_with(engine, 1.0, 2.0)
    engine.destroy()


def test_one_rank_meets_nobody() -> None:
    ranks.shared(1, _alone)
