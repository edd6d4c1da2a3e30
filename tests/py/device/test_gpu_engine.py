"""What only a device with streams of its own can show, two ranks over NCCL: where the host waits,
what memory is taken, that messages run beside kernels, that failures are heard. Skipped without a
GPU.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from breaking import raises_in_backward
from catching import assert_told, caught
from gpus import nccl
from training import Config, weights
from zerort.errors import CommError, StepError

WIDTH, LAYERS = 512, 16
NUMEL = LAYERS * (WIDTH * WIDTH + WIDTH)
STAGES = [0, 1, 2, 3]
PRECISION: dict[str, Config] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
    )


def engine_at(stage: int, precision: str = "fp32", **more: Any) -> Any:
    """About 4 M parameters in eight buckets; at stage 3 all are sharded, with room for half."""
    zero = {
        "stage": stage,
        "reduce_bucket_size": NUMEL // 8,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": NUMEL // 2,
        **more.pop("zero_optimization", {}),
    }
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        **PRECISION[precision],
        **more,
    }
    engine, *_ = zerort.initialize(model=layers(), config=config)
    return engine


def loss_at(engine: Any, rank: int, step: int, size: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(2 * step + rank)
    dtype = next(engine.module.parameters()).dtype
    inputs = torch.randn(size, WIDTH, generator=draw).to(engine.device, dtype)
    return engine(inputs).float().square().mean()


def step(engine: Any, rank: int, number: int) -> None:
    engine.backward(loss_at(engine, rank, number))
    engine.step()


def warm_up(rank: int) -> None:
    """What libraries make once a process: work spaces, kernels, contexts."""
    engine = engine_at(0)
    step(engine, rank, 0)
    engine.destroy()
    torch.cuda.synchronize()


# ---- where the host waits


def host_waits(rank: int, world: int) -> dict[tuple[int, str], tuple[int, int]]:
    """By stage and precision: waits of the host in a forward and backward, and in a step."""
    found = {}
    warm_up(rank)
    for stage in STAGES:
        for precision in PRECISION:
            engine = engine_at(stage, precision)
            for number in range(4):
                step(engine, rank, number)
            dtype = next(engine.module.parameters()).dtype
            inputs = torch.randn(8, WIDTH, device=engine.device, dtype=dtype)
            with _counting() as passes:
                engine.backward(engine(inputs).float().square().mean())
            with _counting() as update:
                engine.step()
            engine.destroy()
            found[stage, precision] = _waits(passes), _waits(update)
    return found


def _waits(noted: list[warnings.WarningMessage]) -> int:
    """torch also says, once, that the mode is a prototype."""
    return sum("called a synchronizing" in str(one.message) for one in noted)


class _counting(warnings.catch_warnings):
    """Within, each wait of the host for the device is one warning."""

    def __init__(self) -> None:
        super().__init__(record=True)

    def __enter__(self) -> Any:
        caught_ones = super().__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return caught_ones

    def __exit__(self, *raised: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        super().__exit__(*raised)


@nccl
def test_the_host_waits_nowhere_in_a_pass_and_for_the_vote_in_a_step() -> None:
    """At stage 3 it also asks whether a gathered parameter has been written."""
    for found in ranks.run(2, host_waits):
        assert {passes for passes, _ in found.values()} == {0}, found
        assert all(update <= 1 + (stage == 3) for (stage, _), (_, update) in found.items()), found


# ---- memory


BYTES_EACH = {
    (0, "fp32"): 16 + 2,
    (0, "bf16"): 18 + 1,
    (1, "fp32"): 10 + 2,
    (1, "bf16"): 10 + 1,
    (2, "fp32"): 10 + 2,
    (2, "bf16"): 10 + 1,
    (3, "fp32"): 8 + 2,
    (3, "bf16"): 9 + 1,
}
"""Of a parameter, by stage and precision: its values, sums, master and moments, and behind the
plus the four buckets of eight that may be in flight.
"""


def memory(rank: int, world: int) -> dict[tuple[int, str], tuple[int, int]]:
    """By stage and precision: bytes allocated at rest, and the peak of a step."""
    found = {}
    warm_up(rank)
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            gc.collect()
            before = torch.cuda.memory_allocated()
            engine = engine_at(stage, precision)
            for number in range(4):
                step(engine, rank, number)
            torch.cuda.synchronize()
            rest = torch.cuda.memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()
            step(engine, rank, 4)
            torch.cuda.synchronize()
            found[stage, precision] = rest, torch.cuda.max_memory_allocated() - before
            engine.destroy()
            del engine
    return found


@nccl
def test_memory_at_rest_is_a_stages_share() -> None:
    for found in ranks.run(2, memory):
        each = {key: (rest / NUMEL, peak / NUMEL) for key, (rest, peak) in found.items()}
        for key, expected in BYTES_EACH.items():
            rest, peak = each[key]
            assert rest <= expected + 0.6, each
            assert peak <= rest + 4, each


# ---- messages beside kernels


def kernels(rank: int, world: int, stage: int) -> list[tuple[str, float, float]]:
    """Name, start and end (microseconds) of what ran on the device in one step."""
    engine = engine_at(stage, "bf16", gradient_clipping=0.0)
    for number in range(5):
        engine.backward(loss_at(engine, rank, number, 4096))
        engine.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        engine.backward(loss_at(engine, rank, 5, 4096))
        engine.step()
        torch.cuda.synchronize()
    engine.destroy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "kernel"
    ]


@nccl
@pytest.mark.parametrize("stage", STAGES)
def test_messages_run_beside_the_kernels_of_a_backward(stage: int) -> None:
    for found in ranks.run(2, kernels, stage):
        messages = [(start, end) for name, start, end in found if "nccl" in name.lower()]
        others = [(start, end) for name, start, end in found if "nccl" not in name.lower()]
        beside = [
            message
            for message in messages
            if any(start < message[1] and message[0] < end for start, end in others)
        ]
        assert len(messages) >= 8, found
        assert len(beside) >= len(messages) // 2, (len(beside), len(messages))


# ---- state on the host


def offloaded(rank: int, world: int, stage: int, home: Config) -> list[float]:
    engine = engine_at(stage, "bf16", zero_optimization=home)
    losses = []
    for _ in range(6):
        loss = loss_at(engine, rank, 0)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


@nccl
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_on_the_host_trains_as_it_does_on_the_device(stage: int) -> None:
    on_host = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    if stage == 3:
        on_host["offload_param"] = {"device": "cpu", "pin_memory": True}
    here = ranks.run(2, offloaded, stage, {})
    there = ranks.run(2, offloaded, stage, on_host)
    assert here[0][-1] < 0.5 * here[0][0]
    assert there[0] == pytest.approx(here[0], rel=2e-2)


# ---- failures


def explode_on_rank_1(rank: int, world: int, stage: int) -> tuple[Exception | None, float, Tensor]:
    """The error, after how many seconds, and a weight after two more steps."""
    engine = engine_at(stage)
    for number in range(3):
        step(engine, rank, number)
    start = time.monotonic()
    bomb = engine.module[LAYERS // 2].register_forward_hook(
        lambda _, args, out: raises_in_backward(out, ArithmeticError("the bomb of rank 1"))
    )
    if rank == 0:
        bomb.remove()
    loss = loss_at(engine, rank, 3)
    bomb.remove()
    if rank == 1:
        error = caught(lambda: engine.backward(loss))
        engine.step()  # void
    else:
        engine.backward(loss)
        error = caught(engine.step)
    took = time.monotonic() - start
    for number in range(4, 6):
        step(engine, rank, number)
    kept = weights(engine)["0.0.weight"]
    engine.destroy()
    return error, took, kept


@nccl
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_raises_in_a_backward_is_heard_and_training_goes_on(stage: int) -> None:
    innocent, culprit = ranks.run(2, explode_on_rank_1, stage)
    assert_told(culprit[0], ArithmeticError, "the bomb of rank 1")
    assert_told(innocent[0], StepError, "rank 1", "the bomb of rank 1")
    assert innocent[1] < 30, innocent
    assert torch.equal(innocent[2], culprit[2])


def die_on_rank_1(rank: int, world: int, stage: int) -> tuple[Exception | None, float]:
    engine = engine_at(stage)
    for number in range(3):
        step(engine, rank, number)
    start = time.monotonic()
    if rank == 1:
        raise ArithmeticError("rank 1 has gone")
    error = caught(lambda: step(engine, rank, 3))
    return error, time.monotonic() - start


@nccl
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_dies_between_steps_is_named(stage: int) -> None:
    innocent, culprit = ranks.attempt(2, die_on_rank_1, stage, timeout=60)
    assert isinstance(culprit, ranks.Raised), culprit
    assert isinstance(innocent, ranks.Returned), innocent
    assert_told(innocent.value[0], CommError, "rank 1")
