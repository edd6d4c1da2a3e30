"""Memory of a rank at stage 3, in bytes under every tensor that is alive: 1/N of everything at
rest, and at most the room beside it in a pass.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import ranks
import zerort
from tap import tapped
from training import keep
from weighing import alive, covered, private, reserved

WIDTH, LAYERS, WINDOW = 128, 16, 4
UNIT = WIDTH * WIDTH
TOTAL = UNIT * LAYERS
ITEM = {"fp32": 4, "bf16": 2}
STATE = {"fp32": 16, "bf16": 18}
"""Bytes a parameter: values, moments, sums, and an fp32 master where they are not fp32."""
SMALL = 8192  # step counts, ballots, scalars


class Found(NamedTuple):
    """Bytes of one rank."""

    at_start: int
    at_rest: int
    whole: int
    """The most that has been whole at once, in a forward or a backward."""
    gathered: int
    """Sent by this rank's all-gathers in a step, once the lists are known."""
    reduced: int
    """Sent by its reduce-scatters."""
    in_flight: int


def made(origin: str) -> nn.Module:
    """The model there on every rank, born in shards, or without values."""
    within = {"whole": nullcontext(), "born": zerort.zero.Init(), "meta": torch.device("meta")}
    with within[origin]:  # type: ignore[attr-defined]
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def weigh(
    rank: int,
    world: int,
    dtype: str,
    room: int,
    origin: str = "whole",
    transport: str = "gloo",
) -> Found:
    gc.freeze()
    before = covered(alive())
    model = made(origin)
    engine, *_ = zerort.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": UNIT,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": room * UNIT,
            },
            "zerort": {"transport": transport},
        },
    )
    at_start = covered(private(alive())) - before
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
        most = max(most, sum(storage.nbytes() for storage in storages.values()))

    with torch._C.DisableTorchFunctionSubclass():
        for layer in model:
            layer.register_forward_hook(look)
            layer.register_full_backward_pre_hook(look)
    for _ in range(2):
        step(engine, dtype)
    with tapped() as calls:
        step(engine, dtype)
    # gloo's all-gather is made of broadcasts, its reduce-scatter of an all-to-all.
    gathered = sum(call.sent for call in calls if call.op == "broadcast")
    reduced = sum(call.sent for call in calls if call.op == "all_to_all_single")
    flights = [t for call in calls if call.op == "all_to_all_single" for t in call.tensors]
    in_flight = covered(flights)
    calls.clear()
    del flights
    at_rest = covered(private(alive())) - in_flight - before
    in_flight += reserved(world)
    keep(engine)
    return Found(at_start, at_rest, most, gathered, reduced, in_flight)


def step(engine: Any, dtype: str) -> None:
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    engine.backward(engine(x).float().mean())
    engine.step()


@pytest.mark.parametrize("room", [3, 6, LAYERS])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_keeps_its_part_and_the_room(world: int, dtype: str, room: int) -> None:
    part = TOTAL // world
    state = part * STATE[dtype]
    moments = part * 8  # which an optimizer makes in its first step
    lanes = WINDOW * 2 * UNIT * ITEM[dtype]
    for found in ranks.run(world, weigh, dtype, room):
        assert found.at_start <= 1.02 * (state - moments) + lanes + SMALL
        assert state <= found.at_rest <= 1.02 * state + SMALL
        assert 0 < found.whole <= room * UNIT * ITEM[dtype]
        assert found.in_flight == lanes
        # What stays from the forward to the backward is gathered once.
        once, unit = ((world - 1) * n // world * ITEM[dtype] for n in (TOTAL, UNIT))
        assert found.reduced == once
        assert found.gathered == 2 * once - room * unit


def test_through_shared_memory_it_keeps_two_turns_of_lanes_and_of_shards_beside_it() -> None:
    part = TOTAL // 2
    state, moments = part * STATE["fp32"], part * 8
    lanes = WINDOW * 2 * UNIT * ITEM["fp32"]
    gathers = 2 * part * ITEM["fp32"]
    for found in ranks.run(2, weigh, "fp32", 3, "whole", "shared"):
        assert found.at_start <= 1.02 * (state - moments) + SMALL
        assert state <= found.at_rest <= 1.02 * state + SMALL
        assert 0 < found.whole <= 3 * UNIT * ITEM["fp32"]
        assert 0 <= found.in_flight - lanes - gathers <= SMALL
        assert found.reduced == found.gathered == 0, "through sockets"


@pytest.mark.parametrize("origin", ["born", "meta"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_so_it_does_with_a_model_that_was_never_whole(origin: str, dtype: str) -> None:
    part = TOTAL // 2
    state, moments, lanes = part * STATE[dtype], part * 8, WINDOW * 2 * UNIT * ITEM[dtype]
    for found in ranks.run(2, weigh, dtype, 3, origin):
        assert found.at_start <= 1.02 * (state - moments) + lanes + SMALL
        assert state <= found.at_rest <= 1.02 * state + SMALL
        assert 0 < found.whole <= 3 * UNIT * ITEM[dtype]
