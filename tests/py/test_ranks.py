"""The harness itself: results by rank, tracebacks, stacks of a rank that hangs, and nothing left
behind.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ranks
import zerort


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


def _policies(rank: int, world: int) -> list[int]:
    """Of the threads that gloo's devices have made for several groups."""
    groups = [dist.new_group(list(range(world))) for _ in range(2)]
    for group in groups:
        dist.all_reduce(torch.ones(1), group=group)
    threads = [
        int(task.name)
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text() == "gloo_tcp_loop\n"
    ]
    return [os.sched_getscheduler(thread) for thread in threads]


def _who_and_what(rank: int, world: int) -> tuple[int, float, float]:
    return os.getpid(), torch.rand(()).item(), random.random()


def _set_a_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def _set_a_variable() -> None:
    os.environ["ZERORT_OF_A_TEST"] = "1"


def _patch_a_method() -> None:
    zerort.Engine.step = None


def _patch_a_call() -> None:
    dist.all_reduce = None


def _fill_a_list() -> None:
    FILLED.append(1)


def _leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(5,)).start()


FILLED: list[int] = []


def _on_the_last(rank: int, world: int, leave: Callable[[], None]) -> None:
    if rank == world - 1:
        leave()


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


@pytest.mark.parametrize("world", [1, 2])
def test_shared_ranks_are_the_same_processes_with_random_numbers_from_the_beginning(
    world: int,
) -> None:
    first = ranks.shared(world, _who_and_what)
    assert ranks.shared(world, _who_and_what) == first
    assert ranks.run(world, _who_and_what) != first
    ranks.end_shared()
    assert ranks.shared(world, _who_and_what) != first


@pytest.mark.parametrize(
    "leave",
    [_set_a_dtype, _set_a_variable, _patch_a_method, _patch_a_call, _fill_a_list, _leave_a_thread],
)
def test_ranks_that_are_left_otherwise_are_not_shared_again(leave: Callable[[], None]) -> None:
    before = ranks.shared(2, _who_and_what)
    ranks.shared(2, _on_the_last, leave)
    after = ranks.shared(2, _who_and_what)
    assert {pid for pid, *_ in before}.isdisjoint(pid for pid, *_ in after)


def test_a_failure_of_shared_ranks_is_its_own() -> None:
    before = ranks.shared(2, _who_and_what)
    with pytest.raises(ranks.RankFailure, match="the last rank's own words"):
        ranks.shared(2, _raise_on_the_last)
    assert ranks.shared(2, _who_and_what)[0][0] != before[0][0]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="threads have no policies here")
def test_groups_share_one_device_whose_thread_takes_no_processor_from_one_that_runs() -> None:
    assert ranks.run(2, _policies) == [[os.SCHED_BATCH]] * 2


def test_no_process_outlives_its_run() -> None:
    ranks.end_shared()
    with pytest.raises(ranks.RankFailure):
        ranks.run(2, _sleep_on_the_first, timeout=1)
    assert ranks.running() == []
