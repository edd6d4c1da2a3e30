"""Ranks of one host that share memory: what arrives is what gloo would have brought, a peer that
ends or stops is named as over gloo, and where memory cannot be shared all ranks go over gloo.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch.utils.dlpack import from_dlpack

import ranks
import tap
import zerort
from cases import CASES
from training import Config, at_stage, config_of, engine_for, take_step, train
from zerort.device.cpu import Cpu
from zerort.errors import CommError, PlanMismatch
from zerort.mesh import meet, segments, shared, uses
from zerort.mesh import process as processes
from zerort.wire.dense import DenseEncoder

LINE = "go over gloo, not through shared memory"


def over(transport: str, stage: int = 2, **more: Any) -> Config:
    return {**at_stage(stage), "zerort": {"transport": transport, **more}}


def mapped() -> int:
    """Segments of this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:zerort" in line for line in maps)


def opened() -> int:
    """Files without a name that this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    return sum("memfd:zerort" in name for name in found)


# Bits.


def both(rank: int, world: int, stage: int, more: dict[str, Any]) -> tuple[Any, Any]:
    one, other = (
        train(rank, world, "mlp", 2, over(transport, stage, **more))
        for transport in ("gloo", "shared")
    )
    return one.weights, other.weights


def agree(found: list[tuple[Any, Any]]) -> None:
    for one, other in found:
        for step, same in zip(one, other, strict=True):
            assert all(torch.equal(step[name], same[name]) for name in step)


SOME: list[tuple[int, dict[str, Any]]] = [
    (0, {"wire": "bf16"}),
    (0, {"wire": "int8", "window": 2}),
    (1, {"publish": "overlapped"}),
    (2, {"wire": "bf16"}),
    (2, {"wire": "int8", "wire_error_feedback": True}),
    (3, {}),
]
ALL = [
    (stage, {"wire": wire, **more})
    for stage in (0, 1, 2, 3)
    for wire in ("fp32", "bf16", "int8")
    for more in ({}, {"window": 1}, {"reduce_at": "micro_batch"})
]


@pytest.mark.parametrize(("stage", "more"), SOME)
def test_the_bits_are_those_of_gloo(stage: int, more: dict[str, Any]) -> None:
    agree(ranks.shared(2, both, stage, more))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("stage", "more"), ALL)
def test_the_bits_are_those_of_gloo_for_more_ranks(
    stage: int, more: dict[str, Any], world: int
) -> None:
    agree(ranks.shared(world, both, stage, more))


# What goes where.


def counted(rank: int, world: int, stage: int) -> set[str]:
    case = CASES["mlp"]
    engine = engine_for(case, config_of(case, 1, over("shared", stage)))
    for step in range(2):
        take_step(engine, case, rank, step)
    with tap.tapped() as calls:
        for step in range(2, 4):
            take_step(engine, case, rank, step)
    engine.destroy()
    return {call.op for call in calls}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nothing_but_the_vote_goes_over_sockets(stage: int) -> None:
    assert ranks.shared(2, counted, stage) == [{"all_reduce"}] * 2


# Memory is given back.


def given_back(rank: int, world: int) -> dict[str, Any]:
    before = mapped(), threading.active_count()
    config = config_of(CASES["mlp"], 1, over("shared"))
    first, second = (engine_for(CASES["mlp"], config) for _ in range(2))
    while_both = mapped()
    shut = opened()
    child = os.fork()
    if child == 0:
        gc.collect()
        for mine in list(first._parts.mesh.shard._mapped):
            mine.leave()
        os._exit(0)
    os.waitpid(child, 0)
    left = [mine.segment.left(rank) for mine in first._parts.mesh.shard._mapped]
    first.destroy()
    one = mapped()
    second.destroy()
    return {
        "before": before,
        "after": (mapped(), threading.active_count()),
        "both": while_both,
        "one": one,
        "open": shut,
        "left": any(left),
    }


def test_memory_is_given_back_with_the_engine_and_no_file_or_thread_is_kept() -> None:
    for found in ranks.shared(2, given_back):
        assert found["after"] == found["before"]
        assert found["both"] > found["one"] > 0
        assert found["open"] == 0
        assert not found["left"], "a fork has said that its parent has left"


# Where it cannot be.


def refused(rank: int, world: int, transport: str, fault: str) -> tuple[str, list[str]]:
    said: list[str] = []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with patch.object(shared._log, "info", lambda text, *args: said.append(text % args)):
        try:
            if fault == "limit" and rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
            with _fault(fault if rank == 1 else ""):
                losses = train(rank, world, "mlp", 1, over(transport)).weights
            return str(len(losses)), said
        except CommError as error:
            return str(error), said
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def _fault(fault: str) -> Any:
    match fault:
        case "memory":
            return patch.object(type(segments.HERE), "free_memory", lambda _: 1 << 20)
        case "reservation":
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return patch.object(os, "posix_fallocate", Mock(side_effect=full))
        case "another place":
            return patch.object(processes, "_place", lambda: "")
        case "another file":
            return patch.object(segments, "_sign", lambda *_: b"0" * 16)
        case _:
            return nullcontext()


FAULTS = {
    "limit": "rank 0: [Errno 27] File too large",
    "reservation": "cannot be reserved: No space left on device (ENOSPC)",
    "memory": "are free",
    "another place": "rank 1: its /proc does not show the process of rank 1",
    "another file": "what rank 1 has written is not what it reads",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_where_one_rank_cannot_all_go_over_gloo_and_one_line_says_why(fault: str) -> None:
    (steps, said), (same, silent) = ranks.shared(2, refused, "auto", fault)
    assert steps == same and int(steps) > 0
    assert len(said) == 1 and LINE in said[0] and FAULTS[fault] in said[0]
    assert silent == []


def elsewhere(rank: int, world: int) -> tuple[str, list[str], int]:
    before = mapped()
    with patch.object(socket, "gethostname", lambda: f"host{rank}"):
        return *refused(rank, world, "auto", ""), mapped() - before


def test_ranks_of_several_hosts_go_over_gloo_without_a_word() -> None:
    for steps, said, segments_made in ranks.shared(2, elsewhere):
        assert int(steps) > 0 and said == [] and segments_made == 0


def test_where_it_is_asked_for_and_cannot_be_all_ranks_say_so() -> None:
    for message, _ in ranks.run(2, refused, "shared", "limit"):
        assert "ranks cannot share memory" in message and FAULTS["limit"] in message


def settings(rank: int, world: int) -> str:
    transport = "gloo" if rank else "shared"
    with pytest.raises(PlanMismatch) as raised:
        engine_for(CASES["mlp"], config_of(CASES["mlp"], 1, over(transport)))
    return str(raised.value)


def test_ranks_that_are_configured_apart_are_named() -> None:
    assert all("zerort.transport" in message for message in ranks.shared(2, settings))


def lengths(rank: int, world: int) -> str:
    control = meet(timedelta(seconds=20))
    try:
        with pytest.raises(segments.Unshared) as raised:
            segments.share(control, 1, 4096 * (1 + rank))  # type: ignore[arg-type]
        return str(raised.value)
    finally:
        control.close()


def test_a_segment_that_is_not_as_long_as_planned_is_refused() -> None:
    for message in ranks.shared(2, lengths):
        assert message.startswith("rank 1: ") and "the file has" in message


def begins(rank: int, world: int) -> tuple[int, bool]:
    """What a rank finds in its own memory, and whether a model whose first parameter is shorter
    than what was written there to be recognised is trained as over gloo.
    """
    control = meet(timedelta(seconds=20))
    found = segments.share(control, 1, 4096)  # type: ignore[arg-type]
    own = int(from_dlpack(found.buffer(rank, 0, 4096)).count_nonzero())
    control.close()
    norms = []
    for transport in ("gloo", "shared"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        config = {"train_micro_batch_size_per_gpu": 1, "zerort": {"transport": transport}}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
        for step in range(4):
            engine.backward(engine(torch.ones(1, 3) * (1 + rank + step)).sum())
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
        engine.destroy()
    return own, norms[:4] == norms[4:]


def test_memory_begins_as_zeros() -> None:
    assert ranks.shared(2, begins) == [(0, True)] * 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_process_of_another_user_cannot_open_it() -> None:
    descriptor = segments._file()
    try:
        os.ftruncate(descriptor, 4096)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        code = f"import os; os.setuid(65534); os.open({path!r}, os.O_RDWR)"
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "PermissionError" in found.stderr
    finally:
        os.close(descriptor)


def test_a_segment_cannot_become_shorter_under_a_peer() -> None:
    descriptor = segments._file()
    try:
        os.ftruncate(descriptor, 8192)
        segments._seal(descriptor)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 4096)
    finally:
        os.close(descriptor)


# A peer that ends, or stops.

PHASES: dict[str, tuple[Any, str]] = {
    "packing": (DenseEncoder, "encode"),
    "posted": (uses.Use, "is_completed"),
    "summing": (Cpu, "reduce"),
    "publishing": (uses.Gather, "write"),
    "published": (uses.Gather, "read"),
}


def ends(rank: int, world: int, phase: str, number: int) -> tuple[str, float]:
    """Rank 1 sends itself the signal in the phase, in its second step."""
    case = CASES["mlp"]
    config = config_of(case, 1, over("shared", timeout=3.0))
    engine = engine_for(case, config)
    target, name = PHASES[phase]
    original: Callable[..., Any] = getattr(target, name)
    began = [0.0]

    def struck(*args: Any, **kwargs: Any) -> Any:
        if began[0]:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with patch.object(target, name, struck) if rank == 1 else nullcontext():
        try:
            for step in range(50):
                began[0] = time.monotonic() if step else 0.0
                take_step(engine, case, rank, step)
        except CommError as error:
            return str(error), time.monotonic() - began[0]
    return "no error", 0.0


def test_a_peer_is_named_that_is_killed(phase: str = "packing") -> None:
    outcome, died = ranks.attempt(2, ends, phase, signal.SIGKILL, timeout=30.0)
    assert isinstance(died, ranks.Died) and died.exitcode == -signal.SIGKILL
    assert isinstance(outcome, ranks.Returned), outcome
    message, seconds = outcome.value
    # once its parent has asked, nobody knows how
    assert "rank 1" in message and ("was killed by SIGKILL" in message or "has exited" in message)
    assert seconds < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "packing"])
def test_a_peer_is_named_that_is_killed_in_any_phase(phase: str) -> None:
    test_a_peer_is_named_that_is_killed(phase)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_peer_is_named_that_is_stopped_in_any_phase(phase: str) -> None:
    outcome, _ = ranks.attempt(2, ends, phase, signal.SIGSTOP, timeout=15.0, grace=None)
    assert isinstance(outcome, ranks.Returned), outcome
    message, seconds = outcome.value
    assert "rank 1" in message and "is stopped" in message
    assert 2.5 < seconds < 8.0
