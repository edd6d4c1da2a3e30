"""int8 on the wire: what is trained is what a twin trains to the bit, at every stage, with error
feedback and without, over one and several passes of a window.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
from hills import RATE, Hills, Variant, take_step, weights_of
from tap import tapped
from training import keep
from zerort.errors import NonFiniteGradient
from zerort.wire import FORMATS, number_of
from zerort.wire.int8 import Turn

WORLD, STEPS, GROUP = 2, 5, 256
INT8, BF16 = number_of("int8"), number_of("bf16")


# The twin.


def pieces_of(values: Tensor, world: int) -> list[Tensor]:
    """Groups of (world x n,), in order."""
    return [group for shard in values.chunk(world) for group in shard.split(GROUP)]


def sent(values: Tensor, world: int) -> Tensor:
    """To the nearest code, and back."""
    found = []
    for group in pieces_of(values, world):
        scale = group.abs().max() / 127
        codes = (group * (1 / scale if scale else 0.0)).round()
        found.append(codes * scale)
    return torch.cat(found)


def kept(wanted: Tensor, got: Tensor, world: int) -> Tensor:
    """What was left out, in 65536th parts of a step."""
    found = []
    for group, lost in zip(pieces_of(wanted, world), pieces_of(wanted - got, world), strict=True):
        scale = group.abs().max() / 127
        units = (lost * ((1 / scale if scale else 0.0) * 65536)).clamp(-32767, 32767).round()
        found.append(units * (scale / 65536))
    return torch.cat(found)


def trained_by_twin(variant: Variant, spec: Any, which: int) -> Tensor:
    """One bucket of one parameter over all steps, by the definition: fp32, ranks in order."""
    models = [Hills(rank) for rank in range(WORLD)]
    numel, shape = spec.numel, Hills.SHAPES[which]
    residuals = [torch.zeros(numel) for _ in models]
    of_sums = torch.zeros(numel)
    every = variant.stage >= 2
    for step in range(STEPS):
        total = torch.zeros(numel)
        gradients = [[torch.zeros(numel) for _ in range(variant.gas)] for _ in models]
        for rank, model in enumerate(models):
            for micro in range(variant.gas):
                (model(step, micro) / variant.gas).backward()
                grad = model.params[which].grad
                gradients[rank][micro][: grad.numel()] = grad.flatten()
                model.zero_grad()
        passes = range(variant.gas) if every else range(1)
        for index in passes:
            arrived = []
            for rank in range(WORLD):
                micros = gradients[rank]
                own = micros[index] if every else sum(micros[1:], start=micros[0])
                wanted = own + residuals[rank]
                got = sent(wanted, WORLD)
                residuals[rank] = kept(wanted, got, WORLD)
                arrived.append(got)
            summed = sum(arrived[1:], start=arrived[0]) * (1 / WORLD)
            total = summed if index == 0 else total + summed
        if variant.stage == 0:
            wanted = total + of_sums
            total = sent(wanted, WORLD)
            of_sums = kept(wanted, total, WORLD)
        weights = models[0].params[which].detach()
        stepped = weights.sub(total[: weights.numel()].view(shape), alpha=RATE)
        for model in models:
            model.params[which].data = stepped
    return models[0].params[which].detach()


# The ranks.

WITH_FEEDBACK = [Variant(0, 1), Variant(0, 3), Variant(1, 1), Variant(1, 3)]
WITH_FEEDBACK += [Variant(stage, gas, True) for stage in (2, 3) for gas in (1, 3)]
WITHOUT = [Variant(0, 1, False), Variant(2, 3), Variant(3, 1)]


@dataclass
class Seen:
    """What one rank has of a variant."""

    weights: list[Tensor]
    wires: dict[int, int]
    """Of each parameter."""
    sent: Counter[str]
    """Bytes of the last step by collective."""
    shards: list[tuple[int, int]]
    """Elements of each bucket's shard, and its wire."""
    specs: list[Any]


@dataclass
class Spec:
    numel: int
    params: list[int]


def train(rank: int, world: int, variants: list[Variant]) -> list[Seen]:
    found = []
    for variant in variants:
        engine = replace(variant, transport="gloo").engine(rank)  # which is counted
        for step in range(STEPS - 1):
            take_step(engine, step, variant.gas)
        with tapped() as calls:
            take_step(engine, STEPS - 1, variant.gas)
        sent: Counter[str] = Counter()
        for call in calls:
            sent[call.op] += call.sent
        buckets = engine._parts.reduction.plan.buckets
        found.append(
            Seen(
                weights_of(engine),
                {param: bucket.wire for bucket in buckets for param in bucket.params},
                sent,
                [(bucket.shard_numel, bucket.wire) for bucket in buckets],
                [Spec(bucket.numel, list(bucket.params)) for bucket in buckets],
            )
        )
        keep(engine)
    return found


@ranks.once(None)
def seen() -> list[list[Seen]]:
    """By rank; those without feedback twice."""
    return ranks.shared(WORLD, train, [*WITH_FEEDBACK, *WITHOUT, *WITHOUT])


@pytest.mark.parametrize("variant", WITH_FEEDBACK, ids=str)
def test_what_is_trained_is_what_the_twin_trains_to_the_bit(variant: Variant) -> None:
    for of_rank in seen():
        found = of_rank[WITH_FEEDBACK.index(variant)]
        for spec in found.specs:
            for which in spec.params:
                if found.wires[which] == INT8:
                    assert spec.params == [which]
                    expected = trained_by_twin(variant, spec, which)
                    assert torch.equal(found.weights[which], expected), which


@pytest.mark.parametrize("index", range(len(WITHOUT)))
def test_without_feedback_ranks_agree_and_a_rerun_is_the_same(index: int) -> None:
    first = len(WITH_FEEDBACK)
    runs = [
        of_rank[at].weights
        for of_rank in seen()
        for at in (first + index, first + len(WITHOUT) + index)
    ]
    for weights in runs[1:]:
        assert all(map(torch.equal, weights, runs[0]))


def test_random_rounding_is_another_on_another_rank_and_in_another_step() -> None:
    seeds = set()
    for rank in range(3):
        for bucket in range(3):
            turn = Turn()
            for _ in range(3):
                seeds |= {turn.seed(rank, bucket), turn.seed(rank, bucket)}
                turn.close(applied=True)
    assert len(seeds) == 3 * 3 * 3 * 2
    turn = Turn()
    before = [turn.seed(0, 0), turn.seed(0, 0)]
    turn.close(applied=False)
    assert [turn.seed(0, 0), turn.seed(0, 0)] == before


def test_vectors_are_sent_in_16_bits_and_matrices_in_8() -> None:
    for of_rank in seen():
        for found in of_rank:
            assert found.wires == {0: INT8, 1: INT8, 2: BF16}


@pytest.mark.parametrize("variant", [*WITH_FEEDBACK, *WITHOUT], ids=str)
def test_a_rank_sends_a_byte_an_element_and_four_a_group(variant: Variant) -> None:
    index = [*WITH_FEEDBACK, *WITHOUT].index(variant)
    passes = variant.gas if variant.stage >= 2 else 1
    for of_rank in seen():
        found = of_rank[index]
        by_wire = {
            INT8: lambda shard: shard + 4 * -(-shard // GROUP),
            BF16: lambda shard: 2 * shard,
        }
        once = sum(by_wire[wire](shard) for shard, wire in found.shards) * (WORLD - 1)
        assert found.sent["all_to_all_single"] == passes * once
        if variant.stage == 0:
            assert found.sent["broadcast"] == once
    assert FORMATS["int8"].shard_bytes(128) == 132
    assert FORMATS["int8"].shard_bytes(512) == 520


# What is dropped, and what is not finite.


def disturbed(rank: int, world: int, stage: int, feedback: Any) -> list[list[Tensor]]:
    """Weights behind four steps: undisturbed, with a step that is skipped, and with a window that
    is dropped among them.
    """
    found = []
    for disturbance in (None, skip, drop):
        engine = Variant(stage, 1, feedback).engine(rank)
        for step in range(4):
            if step == 2 and disturbance is not None:
                disturbance(engine, rank)
            take_step(engine, step)
        found.append(weights_of(engine))
        keep(engine)
    return found


def skip(engine: Any, rank: int) -> None:
    nan = torch.nan if rank == 1 else 1.0
    engine.backward(engine(9, 0) * nan)
    engine.step()
    assert not engine.was_step_applied()


def drop(engine: Any, rank: int) -> None:
    engine.backward(engine(9, 0))
    engine.zero_grad()


@pytest.mark.parametrize(("stage", "feedback"), [(0, True), (1, False), (2, True)])
def test_a_window_that_is_not_applied_leaves_no_trace(stage: int, feedback: bool) -> None:
    for plain, skipped, dropped in ranks.shared(WORLD, disturbed, stage, feedback):
        assert all(map(torch.equal, plain, skipped))
        # at a boundary that reduces there, nothing has been encoded yet
        assert all(map(torch.equal, plain, dropped))


def with_a_nan(rank: int, world: int, stage: int) -> str:
    runtime = {"wire": "int8", "on_nonfinite": "raise"}
    engine = Variant(stage, 1, more={"zerort": runtime}).engine(rank)
    value = torch.inf if rank == 1 else 0.0
    engine.backward(engine(0, 0) + value * engine.module.params[1].flatten()[700])
    with pytest.raises(NonFiniteGradient) as raised:
        engine.step()
    keep(engine)
    return str(raised.value)


@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_not_finite_arrives_and_its_rank_and_parameter_are_named(stage: int) -> None:
    for message in ranks.shared(WORLD, with_a_nan, stage):
        assert "rank 1 brought" in message
        assert "params.1" in message


def with_a_moving_scale(rank: int, world: int) -> list[list[Tensor]]:
    """With a loss scale that doubles at every step, and with one that stays."""
    found = []
    for window in (1, 1000):
        scale = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": window}
        engine = Variant(1, 1, more={"fp16": {**scale, "hysteresis": 1}}).engine(rank)
        scales = []
        for step in range(5):
            engine.backward(engine(step, 0))
            engine.step()
            scales.append(engine.loss_scale)
        assert (len(set(scales)) > 3) == (window == 1)
        found.append(weights_of(engine))
        keep(engine)
    return found


def test_a_loss_scale_that_moves_changes_nothing() -> None:
    for moving, staying in ranks.shared(WORLD, with_a_moving_scale):
        assert all(map(torch.equal, moving, staying))
