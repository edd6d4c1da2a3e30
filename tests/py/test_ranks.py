"""The harness itself: results by rank, tracebacks, stacks of a rank that hangs, and nothing left
behind.
"""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import ranks


def _sum_of_ranks(rank: int, world: int, start: float) -> torch.Tensor:
    total = torch.tensor([start + rank])
    if world > 1:
        dist.all_reduce(total)
    return total


def _raise_on_the_last(rank: int, world: int) -> None:
    if rank == world - 1:
        raise ValueError("the last rank's own words")
    dist.barrier()


def _sleep_on_the_first(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(60)


def _kill_the_first(rank: int, world: int) -> str:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_results_come_back_in_rank_order(world: int) -> None:
    expected = float(world * 10 + world * (world - 1) // 2) if world > 1 else 10.0
    assert [result.item() for result in ranks.run(world, _sum_of_ranks, 10.0)] == [expected] * world


def test_an_exception_comes_back_with_its_rank_and_traceback() -> None:
    with pytest.raises(
        ranks.RankFailure, match=r"(?s)rank 1 raised.*_raise_on_the_last.*the last rank's own words"
    ):
        ranks.run(2, _raise_on_the_last)


def test_a_rank_that_hangs_shows_its_stack() -> None:
    with pytest.raises(
        ranks.RankFailure,
        match=r"(?s)rank 0 did not come back.*_sleep_on_the_first.*rank 1 returned",
    ):
        ranks.run(2, _sleep_on_the_first, timeout=2)


def test_a_rank_that_dies_is_told_from_one_that_returns() -> None:
    assert ranks.attempt(2, _kill_the_first) == [
        ranks.Died(-signal.SIGKILL),
        ranks.Returned("alive"),
    ]


def test_no_process_outlives_its_run() -> None:
    with pytest.raises(ranks.RankFailure):
        ranks.run(2, _sleep_on_the_first, timeout=1)
    assert multiprocessing.active_children() == []
