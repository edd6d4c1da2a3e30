"""What travels is what theory says: bytes and collectives of every rank, counted over a whole step.

With N ranks and M the padded bytes of all buckets, a rank sends (N-1)/N x M to reduce them once and
(N-1)/N x M to gather them once: summed gradients at stage 0, parameters above. Beside that there is
the vote, one small all-reduce. The first step also agrees on a launch order and is left out.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import ranks
import zerort
from cases import CASES
from tap import carried, tapped
from training import Config, config_of, engine_for, keep, take_step

BALLOT = 7 * 8  # bytes a rank brings to the vote
WIRES: dict[str, Config] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
SIZE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Variant:
    stage: int
    gas: int
    dtype: str
    reduce_at: str

    @property
    def passes(self) -> int:
        """How often gradients travel in a step."""
        return self.gas if self.reduce_at == "micro_batch" else 1

    @property
    def config(self) -> Config:
        placement = {
            "zero_optimization": {"stage": self.stage},
            "zerort": {"reduce_at": self.reduce_at, "transport": "gloo"},
        }
        return {**WIRES[self.dtype], **placement}


VARIANTS = [
    Variant(stage, gas, dtype, reduce_at)
    for stage, reduce_at in [(0, "boundary"), (1, "boundary"), (2, "boundary"), (2, "micro_batch")]
    for gas in (1, 2)
    for dtype in SIZE
]


@dataclass(frozen=True)
class Traffic:
    """One step of one rank."""

    buckets: int
    elements: int
    """Of all buckets, padded."""
    parameters: int
    calls: Counter[str]
    sent: Counter[str]
    on_default_group: int


def traffic(rank: int, world: int, variants: list[Variant]) -> list[Traffic]:
    return [_traffic_of(rank, variant) for variant in variants]


def _traffic_of(rank: int, variant: Variant) -> Traffic:
    case = CASES["gpt"]
    engine = engine_for(case, config_of(case, variant.gas, variant.config))
    take_step(engine, case, rank, 0, variant.gas)
    with tapped() as calls:
        take_step(engine, case, rank, 1, variant.gas)
    buckets = engine._parts.reduction.plan.buckets
    sent: Counter[str] = Counter()
    for call in calls:
        sent[call.op] += call.sent
    found = Traffic(
        buckets=len(buckets),
        elements=sum(bucket.numel for bucket in buckets),
        parameters=sum(parameter.numel() for parameter in engine.module.parameters()),
        calls=Counter(call.op for call in calls),
        sent=sent,
        on_default_group=sum(call.on_default_group for call in calls),
    )
    keep(engine)
    return found


@cache
def counted(world: int) -> list[list[Traffic]]:
    """By rank and variant; one job counts all variants."""
    return ranks.run(world, traffic, VARIANTS)


def of_every_rank(world: int, variant: Variant) -> list[Traffic]:
    return [rows[VARIANTS.index(variant)] for rows in counted(world)]


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_world = pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])


@every_variant
@every_world
def test_a_rank_sends_exactly_the_bytes_that_theory_asks_for(world: int, variant: Variant) -> None:
    for found in of_every_rank(world, variant):
        share = found.elements * (world - 1) // world
        assert found.sent == {
            "all_to_all_single": variant.passes * share * SIZE[variant.dtype],
            "broadcast": share * SIZE[variant.dtype],
            "all_reduce": 2 * (world - 1) * BALLOT,
        }


@every_variant
@every_world
def test_a_bucket_costs_one_reduce_scatter_a_pass_and_one_broadcast_a_rank(
    world: int, variant: Variant
) -> None:
    for found in of_every_rank(world, variant):
        assert found.buckets > 5
        assert found.calls == {
            "all_to_all_single": variant.passes * found.buckets,
            "broadcast": world * found.buckets,
            "all_reduce": 1,
        }


@every_world
def test_no_step_uses_the_users_group(world: int) -> None:
    assert [found.on_default_group for rows in counted(world) for found in rows] == [0] * (
        world * len(VARIANTS)
    )


@every_world
def test_padding_is_bounded_by_the_buckets_and_the_parameters(world: int) -> None:
    parameters = len(list(CASES["gpt"].seeded_model().parameters()))
    for found in of_every_rank(world, VARIANTS[0]):
        most = found.buckets * (world * 128 - 1) + parameters * 15
        assert found.parameters <= found.elements <= found.parameters + most


WIDE = 512


def sockets(rank: int, world: int, stage: int) -> tuple[int, int]:
    """(bytes that the sockets carried in two steps, bytes that were counted)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDE, WIDE) for _ in range(4)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": WIDE * WIDE},
        "zerort": {"transport": "gloo"},
    }
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    with tapped() as calls:
        before = carried()
        for _ in range(2):
            engine.backward(engine(torch.randn(1, WIDE)).square().mean())
            engine.step()
        torch.distributed.barrier()  # what was sent has arrived at the peers
        return carried() - before, sum(call.sent for call in calls if call.sent > 0)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's TCP for its counters")
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_the_sockets_carry_what_was_counted(world: int, stage: int) -> None:
    results = ranks.run(world, sockets, stage)
    on_the_wire, counted = (sum(column) for column in zip(*results, strict=True))
    assert counted > 10_000_000
    assert counted <= on_the_wire <= 1.01 * counted, on_the_wire / counted  # headers, the barrier
