"""Groups, threads and descriptors are given back: by `destroy`, by an engine that is dropped, and
by an `initialize` that fails.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import zerort
from catching import assert_told, caught
from zerort.errors import CommError
from zerort.mesh import connect

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 2},
}
CPU = torch.device("cpu")

Held = tuple[int, int, int]


def held() -> Held:
    """This process's groups, threads of any kind, and descriptors."""
    gc.collect()
    groups = len(dist.distributed_c10d._world.pg_map)
    return groups, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(4, 8)).sum())
    engine.step()


def dropped_at_once() -> None:
    zerort.initialize(model=nn.Linear(8, 8), config=CONFIG)


def dropped_after_steps() -> None:
    engine, *_ = zerort.initialize(model=nn.Linear(8, 8), config=CONFIG)
    for _ in range(3):
        step(engine)


def dropped_with_another_time_out() -> None:
    config = {**CONFIG, "zerort": {"timeout": 20.0}}
    step(zerort.initialize(model=nn.Linear(8, 8), config=config)[0])


KEPT: list[nn.Module] = []


def dropped_and_the_model_kept() -> None:
    model = nn.Linear(8, 8)
    engine, *_ = zerort.initialize(model=model, config=CONFIG)
    for _ in range(3):
        step(engine)
    KEPT.append(model)


def dropped_in_a_backward() -> None:
    engine, *_ = zerort.initialize(model=nn.Linear(8, 8), config=CONFIG)
    engine.backward(engine(torch.ones(4, 8)).sum())


def destroyed_twice() -> None:
    engine, *_ = zerort.initialize(model=nn.Linear(8, 8), config=CONFIG)
    step(engine)
    engine.destroy()
    engine.destroy()


def not_initialized() -> None:
    config = {**CONFIG, "optimizer": {"type": "Nope"}}
    assert caught(lambda: zerort.initialize(model=nn.Linear(8, 8), config=config))


def not_initialized_late() -> None:
    def scheduler(_: Any) -> Any:
        raise KeyError("no such schedule")

    call = lambda: zerort.initialize(  # noqa: E731
        model=nn.Linear(8, 8), config=CONFIG, lr_scheduler=scheduler
    )
    assert isinstance(caught(call), KeyError)


WAYS: list[Callable[[], None]] = [
    dropped_at_once,
    dropped_after_steps,
    dropped_with_another_time_out,
    dropped_and_the_model_kept,
    dropped_in_a_backward,
    destroyed_twice,
    not_initialized,
    not_initialized_late,
]


def each_way(rank: int, world: int) -> dict[str, list[Held]]:
    found = {}
    for way in WAYS:
        counts = []
        for _ in range(3):
            way()
            counts.append(held())
            if world > 1:
                dist.barrier()
        found[way.__name__] = counts
    return found


@ranks.once(None)
def counted(world: int) -> list[dict[str, list[Held]]]:
    return ranks.run(world, each_way)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_what_is_held_stays_what_it_was(way: str, world: int) -> None:
    for found in counted(world):
        first, *later = found[way]
        assert first[0] == (1 if world > 1 else 0)
        for groups, threads, files in later:
            assert groups == first[0]
            assert threads <= first[1]
            assert files <= first[2] + 1  # a descriptor of the allocator's or the logger's own


def dropped_engine(rank: int, world: int) -> tuple[list[bool], bool]:
    model = nn.Linear(8, 8)
    engine, *_ = zerort.initialize(model=model, config=CONFIG)
    for _ in range(3):
        step(engine)
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    alive = weakref.ref(engine)
    del engine, _
    gc.collect()
    model(torch.ones(4, 8)).sum().backward()
    hooked = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    trains_on = model.weight.grad is not None and not hooked
    hooked.clear()
    gone = [alive() is None]
    other = weakref.ref(model)
    del model
    gc.collect()
    return [*gone, other() is None], trains_on


@pytest.mark.parametrize("world", [1, 2])
def test_a_dropped_engine_lets_go_of_the_model_and_the_model_trains_on(world: int) -> None:
    for gone, trains_on in ranks.run(world, dropped_engine):
        assert gone == [True, True]
        assert trains_on


# ---- behind the last collective


def closed_behind(rank: int, world: int) -> dict[str, list[float]]:
    """Seconds that `close` sleeps: with what came last waited for a while ago, just now, and not at
    all though it is complete.
    """
    slept: dict[str, list[float]] = {}
    sleep = time.sleep
    for name in ("a while ago", "just now", "never"):
        mesh = connect(timedelta(seconds=20), CPU)
        work = mesh.shard.all_gather(torch.zeros(2)).start()
        while not work.is_completed():
            sleep(0.001)
        if name != "never":
            work.wait()
        mesh.control.all_reduce(torch.zeros(1))
        if name != "just now":
            sleep(0.05)
        slept[name] = []
        with mock.patch.object(time, "sleep", slept[name].append):
            mesh.close()
    return slept


def test_groups_are_given_back_once_their_workers_have_had_time_to_let_go() -> None:
    for slept in ranks.run(2, closed_behind):
        assert slept["a while ago"] == []
        assert slept["just now"]
        assert all(0 < seconds <= 0.02 for seconds in slept["just now"])
        assert slept["never"] == [pytest.approx(0.02, abs=0.005)]  # the control group's is long ago


# ---- with a collective under way


def closed_meanwhile(rank: int, world: int, drop: bool) -> tuple[float, int, bool, int]:
    """Rank 0 gives its groups back while it waits for rank 1, which takes its time."""
    mesh = connect(timedelta(seconds=20), CPU)
    buffer = torch.full((2,), float(rank))
    gc.collect()
    gc.disable()
    turns = 0
    if rank == 1:
        time.sleep(2)
    work = mesh.shard.all_gather(buffer).start()
    stop = threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.wait(0.01):
            turns += 1

    threading.Thread(target=count, daemon=True).start()
    start = time.monotonic()
    if rank == 1:
        work.wait()
    if drop:
        del mesh, work
        gc.collect()
    else:
        mesh.close()
    seconds = time.monotonic() - start
    while len(dist.distributed_c10d._world.pg_map) > 1 and time.monotonic() < start + 15:
        time.sleep(0.05)
    stop.set()
    return seconds, turns, buffer.tolist() == [0.0, 1.0], held()[0]


def test_close_waits_for_what_is_under_way_and_holds_up_no_other_thread() -> None:
    (seconds, turns, whole, groups), _ = ranks.run(2, closed_meanwhile, False)
    assert 1 < seconds < 10
    assert turns > 50
    assert whole
    assert groups == 1


def test_dropping_waits_for_nothing_and_gives_back_once_the_collective_is_over() -> None:
    (seconds, _, whole, groups), _ = ranks.run(2, closed_meanwhile, True)
    assert seconds < 1
    assert whole
    assert groups == 1


def used_after_close(rank: int, world: int) -> list[Exception | None]:
    mesh = connect(timedelta(seconds=20), CPU)
    mesh.close()
    return [
        caught(lambda: mesh.job.control.gather_objects(0)),
        caught(lambda: mesh.shard.all_gather(torch.zeros(2)).start()),
        caught(lambda: mesh.shard.broadcast(torch.zeros(2))),
    ]


def test_what_was_given_back_says_so() -> None:
    for errors in ranks.run(2, used_after_close):
        for error in errors:
            assert_told(error, CommError, "have been given back by engine.destroy()")
