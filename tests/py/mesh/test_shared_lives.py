"""What memory that ranks share costs at a start, what becomes of it when plans and engines come and
go, and what waits for whom.

Segments and descriptors are counted where the system lists them.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from test_shared import LINE, agree, mapped, opened, over
from torch import Tensor, nn

import ranks
import tap
import zerort
from cases import CASES
from training import config_of, engine_for, take_step, train, weights
from weighing import reserved, shared
from zerort.mesh import segments
from zerort.mesh import shared as sharing

WIDTH = 16


def deep(layers: int, stage: int, **runtime: Any) -> Any:
    """A bucket for each of `layers`, each a unit of its own at stage 3."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": WIDTH * WIDTH,
            "stage3_param_persistence_threshold": 0,
        },
        "zerort": {"transport": "shared", **runtime},
    }
    return zerort.initialize(model=model, config=config)[0]


def step(engine: Any, seed: int) -> None:
    torch.manual_seed(seed)
    engine.backward(engine(torch.randn(1, WIDTH)).square().mean())
    engine.step()


# The start.


def rounds(rank: int, world: int, stage: int) -> list[tuple[int, int, int]]:
    """By layers: rounds among the ranks for memory at a start, segments, and buckets."""
    found = []
    for layers in (2, 40):
        together, calls = segments._together, []

        def counted(
            control: Any, attempt: Any, together: Any = together, calls: Any = calls
        ) -> Any:
            calls.append(attempt)
            return together(control, attempt)

        with patch.object(segments, "_together", counted):
            engine = deep(layers, stage)
        found.append((len(calls), mapped(), len(engine._parts.reduction.plan.buckets)))
        engine.destroy()
        del engine
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_start_takes_as_many_rounds_with_forty_buckets_as_with_two(stage: int) -> None:
    for few, many in ranks.shared(2, rounds, stage):
        assert many[:2] == few[:2], "a round or a segment for each bucket"
        assert many[0] == 3 * many[1] <= 6 and many[2] >= 40


# Memory.


def bounded(rank: int, world: int, stage: int) -> tuple[int, int, bool]:
    """Bytes for gathers, where all of them would take too much and where not; and whether the
    values are the same.
    """
    found, ends = [], []
    for enough in (1 << 20, 1):
        with patch.object(sharing, "_ENOUGH", enough):
            engine = deep(20, stage, reduce_at="micro_batch")
            for number in range(3):
                step(engine, number)
            for number in range(2):  # nothing is gathered backwards
                engine.eval()
                torch.manual_seed(number)
                with torch.no_grad():
                    engine(torch.randn(1, WIDTH))
                engine.train()
                step(engine, 3 + number)
            found.append(reserved(world))
            ends.append(weights(engine))
            engine.destroy()
            del engine
    return *found, all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])  # type: ignore[return-value]


@pytest.mark.parametrize("stage", [1, 3])
def test_gathers_share_a_few_memories_where_each_of_its_own_would_be_large(stage: int) -> None:
    shard = 4 * WIDTH * WIDTH // 2
    for every, few, same in ranks.shared(2, bounded, stage):
        assert same
        assert every - few == pytest.approx(2 * (20 - 4) * shard, abs=4096)


def rests(rank: int, world: int) -> bool:
    """Whether gradients of micro-batches that wait lie in memory that is shared, window after
    window.
    """
    case = CASES["mlp"]
    engine = engine_for(case, config_of(case, 3, over("shared", 1)))
    there = True
    for number in range(4):
        take_step(engine, case, rank, number, accumulation=2)
        before = [p.grad.data_ptr() for p in engine.module.parameters()]
        there &= all(any(at in span for span in shared()) for at in before)
        take_step(engine, case, rank, 100 + number, accumulation=1)
    engine.destroy()
    return there


def test_gradients_wait_where_they_are_sent_from() -> None:
    assert ranks.shared(2, rests) == [True] * 2


# Engines and plans that come and go.


def comes_and_goes(rank: int, world: int, times: int) -> tuple[Any, Any, Any]:
    def state() -> tuple[int, int, int, int]:
        files = len(os.listdir("/proc/self/fd"))
        return mapped(), opened(), threading.active_count(), files

    case, counts = CASES["mlp"], []
    for number in range(times):
        engine = engine_for(case, config_of(case, 1, over("shared", number % 4)))
        take_step(engine, case, rank, 0)
        take_step(engine, case, rank, 1)
        engine.destroy()
        del engine
        counts.append(state())
    return counts[3], counts[-1], max(count[0] for count in counts)


def check_that_nothing_stays(times: int) -> None:
    for early, late, most in ranks.run(2, comes_and_goes, times, timeout=120):
        assert early == late and early[:2] == (0, 0) and most == 0


def test_eight_engines_leave_nothing() -> None:
    check_that_nothing_stays(8)


@pytest.mark.slow
def test_fifty_engines_leave_nothing() -> None:
    check_that_nothing_stays(50)


def plans(rank: int, world: int) -> tuple[list[int], bool]:
    """Segments and bytes: at a start, with another order, unloaded, and loaded again."""
    engine, other = (deep(6, 1, transport=each) for each in ("shared", "gloo"))
    counts = [mapped()]
    held = [reserved(world)]
    for number in range(2):
        step(engine, number)
    counts.append(mapped())
    held.append(reserved(world))
    engine._parts.reduction.unload()
    counts.append(mapped())
    engine._parts.reduction.reload()
    counts.append(mapped())
    held.append(reserved(world))
    for number in range(2, 4):
        step(engine, number)
    for number in range(4):
        step(other, number)
    one, two = weights(engine), weights(other)
    for each in (engine, other):
        each.destroy()
    assert len(set(held)) == 1, held
    return counts, all(torch.equal(one[name], two[name]) for name in one)


def test_a_plans_memory_goes_with_it() -> None:
    for counts, same in ranks.shared(2, plans):
        assert counts == [2, 2, 0, 2] and same


def in_turn(rank: int, world: int) -> bool:
    """Two engines, whose steps take turns and whose passes are nested."""
    alone = deep(4, 2, transport="gloo")
    first, second = deep(4, 2), deep(4, 1)
    for number in range(3):
        step(alone, number)
        torch.manual_seed(number)
        x = torch.randn(1, WIDTH)
        loss = first(x).square().mean()
        other = second(x).square().mean()
        second.backward(other)
        first.backward(loss)
        second.step()
        first.step()
    expected, *found = (weights(engine) for engine in (alone, first, second))
    for engine in (alone, first, second):
        engine.destroy()
    return all(torch.equal(one[name], expected[name]) for one in found for name in expected)


def test_several_engines_of_one_process_do_not_meet() -> None:
    assert ranks.shared(2, in_turn) == [True] * 2


def beside_a_fork(rank: int, world: int) -> tuple[int, int, bool]:
    """A process is forked while an engine has segments, as a DataLoader's worker is, and outlives
    it. Segments after the engine, and after another.
    """
    engine = deep(4, 1)
    step(engine, 0)
    hold, let_go = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            os.close(let_go)
            os.read(hold, 1)
        finally:
            os._exit(0)
    step(engine, 1)
    engine.destroy()
    del engine
    left = mapped()
    engine = deep(4, 1)  # what the worker still maps is none of its business
    step(engine, 0)
    os.close(hold)
    os.close(let_go)
    os.waitpid(worker, 0)
    step(engine, 1)  # nor is its end
    engine.destroy()
    del engine
    return left, mapped(), True


def test_processes_that_are_forked_beside_it_keep_nothing_from_ending() -> None:
    assert ranks.shared(2, beside_a_fork) == [(0, 0, True)] * 2


# Where it cannot be.


def cannot(rank: int, world: int, fault: str) -> tuple[list[str], Any]:
    said: list[str] = []
    refused = OSError(errno.EPERM, os.strerror(errno.EPERM))
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    opens = os.open

    def no_peer(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc/") and "/fd/" in str(path):
            raise full
        return opens(path, *args, **kwargs)

    faults: dict[str, Any] = {
        "memfd": lambda: patch.object(os, "memfd_create", side_effect=refused),
        "open": lambda: patch.object(os, "open", no_peer),
        "address space": lambda: patch.object(
            segments._core, "Segment", side_effect=MemoryError("Cannot allocate memory")
        ),
    }
    culprit = 0 if fault == "memfd" else 1
    before = opened()
    with ExitStack() as stack:
        stack.enter_context(
            patch.object(sharing._log, "info", lambda text, *a: said.append(text % a))
        )
        stack.enter_context(faults[fault]() if rank == culprit else nullcontext())
        found = train(rank, world, "mlp", 1, over("auto", 2)).weights[-1]
    assert (mapped(), opened()) == (0, before)
    return said, found


@pytest.mark.parametrize("fault", ["memfd", "open", "address space"])
def test_what_the_system_refuses_one_rank_sends_all_over_gloo(fault: str) -> None:
    (said, one), (silent, other) = ranks.shared(2, cannot, fault)
    assert len(said) == 1 and LINE in said[0] and not silent
    assert f"rank {0 if fault == 'memfd' else 1}: " in said[0]
    agree([([one], [other])])


def short_on_one_host(rank: int, world: int) -> tuple[list[str], int, float]:
    """Of two hosts' ranks the last one has no memory left for gradients; buckets are so large that
    gloo makes further groups for them.
    """
    said: list[str] = []
    torch.manual_seed(0)
    model = nn.Linear(512, 512)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zerort": {"transport": "auto", "hierarchy": {"inner": 2}, "timeout": 20.0},
    }
    free = patch.object(type(segments.HERE), "free_memory", lambda _: 1 << 20)
    with (
        patch.object(sharing._log, "info", lambda text, *a: said.append(text % a)),
        free if rank == world - 1 else nullcontext(),
    ):
        engine = zerort.initialize(model=model, config=config)[0]
    for _ in range(2):
        engine.backward(engine(torch.full((1, 512), 1.0 + rank)).square().mean())
        engine.step()
    end = float(model.weight.detach().sum())
    engine.destroy()
    del engine
    return said, mapped(), end


def test_where_one_host_is_short_of_memory_no_host_shares_any() -> None:
    (lines, *first), *others = ranks.run(4, short_on_one_host, timeout=90)
    said = [line for line in lines if "over gloo" in line]
    assert len(said) == 2, "one line for ranks inside hosts, one for those between"
    assert all(LINE in line and "rank 3: " in line and "are free" in line for line in said)
    assert others == [([], *first)] * 3 and first[0] == 0


# Nobody waits in a hook.


class Meeting(torch.autograd.Function):
    """What is called when the backward comes to its end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at_the_end: Any) -> Tensor:
        ctx.at_the_end = at_the_end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.at_the_end()
        return gradient, None


def late(rank: int, world: int, stage: int, window: Any) -> bool:
    """Rank 1 packs nothing before rank 0 has come through all of its hooks."""
    engine = deep(4, stage, window=window)
    for number in range(2):
        step(engine, number)

    def tell() -> None:
        if rank == 0:
            dist.send(torch.ones(1), 1)

    if rank == 1:
        dist.recv(torch.zeros(1), 0)
    x = Meeting.apply(torch.ones(1, WIDTH, requires_grad=True), tell)
    engine.backward(engine(x).square().mean())
    engine.step()
    engine.destroy()
    return True


@pytest.mark.parametrize(("stage", "window"), [(0, "all"), (0, 1), (2, 2)])
def test_red_5_no_hook_waits_for_a_peer_that_is_late(stage: int, window: Any) -> None:
    assert ranks.shared(2, late, stage, window, timeout=20) == [True] * 2


def counted_calls(rank: int, world: int) -> set[str]:
    """With an overlapped publication, sums in bytes and a state of rounding."""
    engine = deep(4, 1, publish="overlapped", wire="int8")
    for number in range(2):
        step(engine, number)
    with tap.tapped() as calls:
        step(engine, 2)
    engine.destroy()
    return {call.op for call in calls}


def test_bytes_and_overlapped_parameters_go_through_memory_too() -> None:
    assert ranks.shared(2, counted_calls) == [{"all_reduce"}] * 2
