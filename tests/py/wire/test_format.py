"""A wire format of another kind is a file and a row: int8 with block scales and error feedback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from int8 import Int8
from tap import tapped
from training import keep
from zerort.errors import NonFiniteGradient
from zerort.mesh.gloo import GlooComm
from zerort.mesh.nccl import NcclComm
from zerort.wire import FORMATS, Extent, Terms, WireFormat
from zerort.wire.dense import Dense, DenseEncoder

WORLD, STEPS, RATE = 2, 60, 0.1
LOUD = 64  # every 64th element has a gradient that is mostly noise
NOISE = 200.0
QUIET = [i for i in range(700) if i % LOUD]

# The loudest element of a block sets its scale, so that a byte counts in steps of 200 / 127: where
# only noise is loud, everything else is rounded away unless what is lost comes back.
RESOLUTION = NOISE / 127


class Valley(nn.Module):
    """Half the squared distance from a target of this rank's own, and noise on some elements."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(20, 20))
        self.second = nn.Parameter(torch.zeros(300))
        generator = torch.Generator().manual_seed(rank)
        self.target = torch.rand(700, generator=generator) - 0.5

    def forward(self, step: int) -> Tensor:
        weights = torch.cat([self.first.flatten(), self.second])
        noise = NOISE if step % 2 else -NOISE
        return 0.5 * (weights - self.target).square().sum() + noise * weights[::LOUD].sum()


@contextmanager
def registered(**formats: WireFormat) -> Iterator[None]:
    """Within, the table has more rows."""
    with patch.dict(FORMATS, formats):
        yield


def engine_for(rank: int, wire: str, stage: int, **more: Any) -> Any:
    model = Valley(rank)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 400},
        "zerort": {"wire": wire, "transport": "gloo"},
        **more,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def take_step(engine: Any, step: int) -> None:
    engine.backward(engine(step))
    engine.step()


def weights_of(engine: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])


@dataclass
class Seen:
    """What one rank saw of a variant."""

    weights: Tensor
    sent: Counter[str]
    """Bytes of one step by collective."""
    expected: Counter[str]


def variants(rank: int, world: int) -> dict[tuple[str, int], Seen]:
    formats = {"int8": Int8(), "forgetful": Int8(feedback=False)}
    with registered(**formats):
        names = ["fp32", *formats]
        return {(wire, stage): _variant(rank, wire, stage) for wire in names for stage in (0, 1, 2)}


def _variant(rank: int, wire: str, stage: int) -> Seen:
    engine = engine_for(rank, wire, stage)
    for step in range(STEPS - 1):
        take_step(engine, step)
    with tapped() as calls:
        take_step(engine, STEPS - 1)
    sent: Counter[str] = Counter()
    for call in calls:
        sent[call.op] += call.sent
    del sent["all_reduce"]  # the vote
    shards = [bucket.shard_numel for bucket in engine._parts.reduction.plan.buckets]
    once = sum(FORMATS[wire].shard_bytes(shard) for shard in shards) * (WORLD - 1)
    whole = sum(shards) * 4 * (WORLD - 1)
    gathered = once if stage == 0 else whole
    seen = Seen(weights_of(engine), sent, Counter(all_to_all_single=once, broadcast=gathered))
    keep(engine)
    return seen


@ranks.once(None)
def seen() -> list[dict[tuple[str, int], Seen]]:
    return ranks.shared(WORLD, variants)


def distance(wire: str, stage: int) -> float:
    """From the bottom of the valley, where nothing is noise."""
    target = (Valley(0).target + Valley(1).target)[QUIET] / 2
    weights = [of_rank[wire, stage].weights for of_rank in seen()]
    assert torch.equal(weights[0], weights[1])
    return float((weights[0][QUIET] - target).abs().max())


every_stage = pytest.mark.parametrize("stage", [0, 1, 2])


@every_stage
def test_error_feedback_comes_as_far_as_fp32_within_what_one_step_rounds(stage: int) -> None:
    assert distance("fp32", stage) < 0.01
    assert distance("int8", stage) < 2 * RATE * RESOLUTION


@every_stage
def test_without_feedback_what_is_small_beside_noise_is_never_learnt(stage: int) -> None:
    assert distance("forgetful", stage) > 0.3


@every_stage
@pytest.mark.parametrize("wire", ["int8", "forgetful", "fp32"])
def test_what_is_sent_is_what_the_format_says_a_shard_takes(wire: str, stage: int) -> None:
    for of_rank in seen():
        assert of_rank[wire, stage].sent == of_rank[wire, stage].expected


def with_a_step_that_is_skipped(rank: int, world: int, stage: int) -> list[Tensor]:
    """Weights behind three steps, with a step that no rank applies among them, and without."""
    found = []
    with registered(int8=Int8()):
        for skips in (False, True):
            engine = engine_for(rank, "int8", stage)
            for step in range(3):
                if skips and step == 2:
                    _skip(engine, rank)
                take_step(engine, step)
            found.append(weights_of(engine))
            keep(engine)
    return found


def _skip(engine: Any, rank: int) -> None:
    second = engine.module.second
    hook = second.register_hook(lambda grad: grad.index_fill(0, torch.tensor(299), torch.nan))
    if rank == 0:
        hook.remove()
    take_step(engine, 7)
    assert not engine.was_step_applied()
    hook.remove()


@every_stage
def test_a_step_that_is_skipped_leaves_no_trace_in_what_is_fed_back(stage: int) -> None:
    for plain, skipped in ranks.shared(WORLD, with_a_step_that_is_skipped, stage):
        assert torch.equal(plain, skipped)


def with_a_window_that_is_dropped(rank: int, world: int) -> list[Tensor]:
    found = []
    with registered(int8=Int8()):
        for drops in (False, True):
            engine = engine_for(rank, "int8", 2)
            take_step(engine, 0)
            if drops:
                engine.backward(engine(1))
                engine.zero_grad()
            take_step(engine, 2)
            found.append(weights_of(engine))
            keep(engine)
    return found


def test_a_window_that_is_dropped_leaves_no_trace_in_what_is_fed_back() -> None:
    for plain, dropped in ranks.shared(WORLD, with_a_window_that_is_dropped):
        assert torch.equal(plain, dropped)


def with_a_nan(rank: int, world: int) -> str:
    with registered(int8=Int8()):
        engine = engine_for(rank, "int8", 2, zerort={"wire": "int8", "on_nonfinite": "raise"})
        nan = torch.nan if rank == 1 else 0.0
        engine.backward(engine(0) + nan * engine.module.second[299])
        with pytest.raises(NonFiniteGradient) as raised:
            engine.step()
        engine.destroy()
    return str(raised.value)


def test_a_nan_survives_the_wire_and_its_rank_and_parameter_are_named() -> None:
    for message in ranks.shared(WORLD, with_a_nan):
        assert "rank 1 brought" in message
        assert "second" in message


def over_a_library_that_adds(rank: int, world: int, wire: str) -> tuple[set[str], Tensor, Tensor]:
    """What NCCL's communicator calls, here over gloo, and what both communicators arrive at."""
    found = []
    with registered(int8=Int8()):
        for kind in (NcclComm, GlooComm):
            with patch("zerort.mesh.mesh.GlooComm", kind):
                engine = engine_for(rank, wire, 1)
            with tapped() as calls:
                for step in range(3):
                    take_step(engine, step)
            found.append(({call.op for call in calls}, weights_of(engine)))
            keep(engine)
    (operations, added), (_, exchanged) = found
    return operations, added, exchanged


@pytest.mark.parametrize("wire", ["int8", "fp32"])
def test_a_library_that_adds_is_asked_to_only_where_the_format_allows_it(wire: str) -> None:
    for operations, added, exchanged in ranks.shared(WORLD, over_a_library_that_adds, wire):
        # the reduce-scatter is resolved at import, so that nobody hears of it here
        assert ("all_to_all_single" in operations) == (wire == "int8")
        torch.testing.assert_close(added, exchanged)


@dataclass
class Watched(Dense):
    """A format whose encoders write down when their windows close."""

    closed: list[tuple[bool, float]] = field(default_factory=list)

    def __init__(self) -> None:
        super().__init__(torch.float16)
        self.closed = []

    def encoder(self, extent: Extent, terms: Terms) -> DenseEncoder:
        encoder = super().encoder(extent, terms)
        encoder.close = lambda *, applied, growth: self.closed.append((applied, growth))  # type: ignore[method-assign]
        return encoder


def test_an_encoder_hears_how_a_window_ended_and_how_the_loss_scale_moved() -> None:
    watched = Watched()
    with registered(watched=watched):
        model = nn.Linear(4, 4, bias=False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "fp16": {
                "enabled": True,
                "initial_scale_power": 4,
                "loss_scale_window": 1,
                "hysteresis": 1,
            },
            "zerort": {"wire": "watched"},
        }
        engine, *_ = zerort.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
        )
        moved = []
        for factor in (1.0, 1.0, torch.inf, 1.0):
            before = engine.loss_scale
            engine.backward(engine(torch.ones(1, 4, dtype=torch.float16)).sum() * factor)
            engine.step()
            moved.append((engine.was_step_applied(), engine.loss_scale / before))
        engine.zero_grad()
        engine.destroy()
    assert watched.closed == [*moved, (False, 1.0)]
    assert {(True, 1.0), (True, 2.0), (False, 0.5)} <= set(moved)


def test_another_state_of_the_model_begins_without_what_was_fed_back(tmp_path: Path) -> None:
    def resumed(*, after: list[int]) -> Tensor:
        engine = engine_for(0, "int8", 2)
        for step in after:
            take_step(engine, step)
        engine.load_checkpoint(tmp_path)
        take_step(engine, 9)
        found = weights_of(engine)
        engine.destroy()
        return found

    with registered(int8=Int8()):
        engine = engine_for(0, "int8", 2)
        take_step(engine, 0)
        engine.save_checkpoint(tmp_path)
        engine.destroy()
        assert torch.equal(resumed(after=[0, 1, 2]), resumed(after=[]))
