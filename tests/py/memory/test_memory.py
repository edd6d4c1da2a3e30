"""Memory of a rank, by counting the bytes under every tensor that is alive: the formulas, and
buckets in flight.

P stands for the elements of all parameters, N for the ranks. Counted at rest, between one `step`
and the next `backward`, and in the middle of an accumulation window; activations are none of the
engine's business.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import ranks
import zerort
from tap import tapped
from training import keep
from weighing import alive, covered, private, reserved

WIDTH, LAYERS = 128, 16
BUCKET = WIDTH * WIDTH
TOTAL = WIDTH * WIDTH * LAYERS
WIRE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Variant:
    stage: int
    dtype: str
    window: int | str = "all"
    gas: int = 1
    sums: str = "fp32"
    """What gradients are added up in."""
    transport: str = "gloo"


@dataclass(frozen=True)
class Bytes:
    """Of one rank."""

    in_flight: int
    """Under what collectives send from and receive into, and of memory that ranks share."""
    at_rest: int
    """Under all other tensors, after a step."""
    in_window: int
    """The same after the first micro-batch of a window."""


def weigh(rank: int, world: int, variants: list[Variant]) -> list[Bytes]:
    gc.freeze()  # what the imports made is neither ours nor worth searching again and again
    return [_weigh_one(world, variant) for variant in variants]


def _weigh_one(world: int, variant: Variant) -> Bytes:
    before, reserved_before = covered(private(alive())), reserved(world)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": variant.gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": variant.dtype == "bf16"},
        "zero_optimization": {"stage": variant.stage, "reduce_bucket_size": BUCKET},
        "data_types": {"grad_accum_dtype": variant.sums},
        "zerort": {"window": variant.window, "transport": variant.transport},
    }
    engine, *_ = zerort.initialize(model=model, config=config)
    with tapped() as calls:
        _window(engine, variant.gas)
    flights = [
        tensor for call in calls if call.op == "all_to_all_single" for tensor in call.tensors
    ]
    in_flight = covered(flights)
    calls.clear()
    del flights
    at_rest = covered(private(alive())) - in_flight - before
    _micro_batch(engine)
    in_window = covered(private(alive())) - in_flight - before
    in_flight += reserved(world) - reserved_before
    keep(engine)
    return Bytes(in_flight, at_rest, in_window)


def _window(engine: Any, gas: int) -> None:
    for _ in range(gas):
        _micro_batch(engine)


def _micro_batch(engine: Any) -> None:
    dtype = engine.module[0].weight.dtype
    engine.backward(engine(torch.ones(1, WIDTH, dtype=dtype)).float().mean())
    engine.step()


PLACEMENTS = [Variant(stage, dtype) for stage in (0, 1, 2) for dtype in WIRE]
WINDOWS = [Variant(stage, dtype, window) for stage in (0, 2) for dtype in WIRE for window in (1, 3)]
ACCUMULATING = [Variant(stage, dtype, gas=2) for stage in (0, 1, 2) for dtype in WIRE]
NARROW = [Variant(stage, "bf16", gas=2, sums="bf16") for stage in (0, 1, 2)]
SHARED = [
    Variant(0, "fp32", gas=2, transport="shared"),
    Variant(1, "fp32", gas=2, transport="shared"),
    Variant(2, "bf16", gas=2, transport="shared"),
]
SHARED_WINDOWS = [Variant(stage, "fp32", 3, transport="shared") for stage in (0, 2)]
VARIANTS = PLACEMENTS + WINDOWS + ACCUMULATING + NARROW + SHARED + SHARED_WINDOWS


@cache
def weighed(world: int) -> list[list[Bytes]]:
    return ranks.run(world, weigh, VARIANTS)


def of_every_rank(world: int, variant: Variant) -> list[Bytes]:
    return [rows[VARIANTS.index(variant)] for rows in weighed(world)]


def parts(variant: Variant, world: int) -> int:
    """Parameters; and of this rank's part: moments, accumulator, and an fp32 master where they are
    not fp32.
    """
    owned = TOTAL if variant.stage == 0 else TOTAL // world
    master = 4 if variant.dtype == "bf16" else 0
    return TOTAL * WIRE[variant.dtype] + owned * (8 + WIRE[variant.sums] + master)


FORMULAS = {
    (0, "fp32"): lambda n: 16,
    (1, "fp32"): lambda n: 8 + 8 / n,
    (2, "fp32"): lambda n: 4 + 12 / n,
    (0, "bf16"): lambda n: 18,
    (1, "bf16"): lambda n: 6 + 12 / n,
    (2, "bf16"): lambda n: 2 + 16 / n,
}
"""Bytes per parameter: Adam, fp32 masters, fp32 gradients."""

every_world = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
SMALL = 4096  # bytes of step counts, ballots, scalars


@pytest.mark.parametrize("variant", ACCUMULATING + SHARED, ids=str)
@every_world
def test_a_window_keeps_no_more_than_the_formula(world: int, variant: Variant) -> None:
    for found in of_every_rank(world, variant):
        assert found.in_window <= 1.02 * TOTAL * FORMULAS[variant.stage, variant.dtype](world)


@pytest.mark.parametrize("variant", NARROW, ids=str)
@every_world
def test_sums_of_low_precision_save_two_bytes_of_every_gradient_that_is_kept(
    world: int, variant: Variant
) -> None:
    kept = TOTAL // world if variant.stage == 2 else TOTAL
    for found in of_every_rank(world, variant):
        assert found.in_window <= 1.02 * (
            TOTAL * FORMULAS[variant.stage, variant.dtype](world) - 2 * kept
        )
        assert 0 <= found.in_window - parts(variant, world) < SMALL


@pytest.mark.parametrize("variant", PLACEMENTS, ids=str)
@every_world
def test_a_rank_keeps_no_more_than_the_formula(world: int, variant: Variant) -> None:
    for found in of_every_rank(world, variant):
        assert found.at_rest <= 1.02 * TOTAL * FORMULAS[variant.stage, variant.dtype](world)


@pytest.mark.parametrize("variant", PLACEMENTS + WINDOWS + SHARED + SHARED_WINDOWS, ids=str)
@every_world
def test_a_rank_keeps_parameters_moments_masters_and_accumulators_and_nothing_else(
    world: int, variant: Variant
) -> None:
    for found in of_every_rank(world, variant):
        assert 0 <= found.at_rest - parts(variant, world) < SMALL


@pytest.mark.parametrize("variant", PLACEMENTS + WINDOWS, ids=str)
@every_world
def test_buckets_in_flight_take_a_window_of_send_and_receive_buffers(
    world: int, variant: Variant
) -> None:
    window = LAYERS if variant.window == "all" else variant.window
    for found in of_every_rank(world, variant):
        assert found.in_flight == window * 2 * BUCKET * WIRE[variant.dtype]


@pytest.mark.parametrize("variant", SHARED + SHARED_WINDOWS, ids=str)
@every_world
def test_memory_that_ranks_share_is_two_turns_of_a_lane_and_of_a_shard_that_is_published(
    world: int, variant: Variant
) -> None:
    lanes = LAYERS if variant.window == "all" else variant.window
    # what is gathered of sums lies in the lane that they were scattered in
    shards = 0 if variant.stage == 0 else LAYERS * BUCKET // world
    expected = 2 * (lanes * BUCKET + shards) * WIRE[variant.dtype]
    for found in of_every_rank(world, variant):
        assert 0 <= found.in_flight - expected < SMALL + 2 * 4096  # two segments, whole pages


@pytest.mark.parametrize("variant", ACCUMULATING + SHARED, ids=str)
@every_world
def test_between_micro_batches_gradients_rest_in_send_buffers_or_are_summed_where_they_arrive(
    world: int, variant: Variant
) -> None:
    # bf16 micro-batches are summed in fp32, of which the accumulator is a part; at stage 0 it is
    # the whole
    held = 4 * (TOTAL - TOTAL // world) if variant.dtype == "bf16" and variant.stage == 1 else 0
    for found in of_every_rank(world, variant):
        assert 0 <= found.in_window - parts(variant, world) - held < SMALL
