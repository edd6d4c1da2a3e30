"""Hops inside hosts and between them, and copies of the model state: sums in the order (inner,
outer) to the bit, the same at every stage; bytes between hosts; everything that reads shards under
their other numbers; a host that is lost.

Two hosts of two ranks, on one machine: where ranks sit is a matter of the configuration here.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import zerort
from cases import CASES
from reference import Moment
from tap import tapped
from training import at_stage, config_of, digest, engine_for, keep, take_step, train
from zerort.errors import CommError, NonFiniteGradient
from zerort.utils import safe_get_full_fp32_param, safe_get_full_grad

WORLD, HOSTS = 4, 2
NESTED: dict[str, Any] = {"zerort": {"hierarchy": {"inner": 2}}}
COPIES: dict[str, Any] = {"zero_optimization": {"mics_shard_size": 2}}
GLOO: dict[str, Any] = {"zerort": {"transport": "gloo"}}
STAGES = [0, 1, 2, 3]


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Sections, joined."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = {**whole.get(key, {}), **value}
    return whole


class Sum(nn.Module):
    """Whose weights' gradients are what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Parameter(torch.zeros(1000))
        self.short = nn.Parameter(torch.zeros(3))

    def forward(self, gradient: Tensor) -> Tensor:
        return (torch.cat([self.long, self.short]) * gradient).sum()


def gradient_of(rank: int, step: int) -> Tensor:
    """Large and small, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    size = 10.0 ** torch.randint(-3, 4, (1003,), generator=generator)
    return torch.randn(1003, generator=generator) * size


def stepped(rank: int, world: int, variants: list[dict[str, Any]]) -> list[Tensor]:
    """The weights after two steps of rate 1, of every variant."""
    return [_stepped(rank, changes) for changes in variants]


def _stepped(rank: int, changes: dict[str, Any]) -> Tensor:
    zero = {"reduce_bucket_size": 600, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    model = Sum()
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        config={**config, **merged({"zero_optimization": zero}, changes)},
    )
    for step in range(2):
        engine.backward(engine(gradient_of(rank, step)))
        engine.step()
    with zerort.zero.GatheredParameters(list(model.parameters())):
        found = torch.cat([model.long.detach(), model.short.detach()]).clone()
    keep(engine)
    return found


def twin(wire: torch.dtype = torch.float32, gathered: torch.dtype = torch.float32) -> Tensor:
    """Inside hosts in fp32, in rank order; between them in the wire's dtype, hosts in order."""
    weights = torch.zeros(1003)
    for step in range(2):
        g = [gradient_of(rank, step) for rank in range(WORLD)]
        first, second = ((g[0] + g[1]).to(wire).float(), (g[2] + g[3]).to(wire).float())
        mean = (first + second) * 0.25
        weights = weights - mean.to(gathered).float()
    return weights


def flat_twin() -> Tensor:
    """In rank order, over all."""
    weights = torch.zeros(1003)
    for step in range(2):
        g = [gradient_of(rank, step) for rank in range(WORLD)]
        weights = weights - (((g[0] + g[1]) + g[2]) + g[3]) * 0.25
    return weights


BF16: dict[str, Any] = {"zerort": {"wire": "bf16"}}


def staged(stage: int, *more: dict[str, Any]) -> dict[str, Any]:
    return merged({"zero_optimization": {"stage": stage}}, *more)


def test_sums_are_in_the_order_inner_outer_to_the_bit_at_every_stage() -> None:
    expected = twin()
    assert not torch.equal(expected, flat_twin()), "the order does not show"
    variants = [staged(stage, seated) for seated in (NESTED, COPIES) for stage in STAGES]
    for found in ranks.shared(WORLD, stepped, variants):
        for variant, weights in zip(variants, found, strict=True):
            assert torch.equal(weights, expected), variant


def test_a_narrow_wire_loses_bits_between_hosts_alone() -> None:
    low = torch.bfloat16
    variants = [staged(2, BF16, NESTED), staged(0, BF16, NESTED)]
    for sharded, replicated in ranks.shared(WORLD, stepped, variants):
        assert torch.equal(sharded, twin(low))
        assert torch.equal(replicated, twin(low, gathered=low))


def test_all_ranks_on_one_host_go_the_way_of_no_hosts() -> None:
    whole: dict[str, Any] = {"zerort": {"hierarchy": {"inner": WORLD}}}
    for one, other in ranks.shared(WORLD, stepped, [staged(1), staged(1, whole)]):
        assert torch.equal(one, other) and torch.equal(one, flat_twin())


# Training, in every way.


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), pytest.param(2, marks=SLOW), 3])
@pytest.mark.parametrize("seated", [NESTED, COPIES], ids=["hosts", "copies"])
def test_a_model_is_trained_as_without(stage: int, seated: Any) -> None:
    changes = merged(at_stage(stage), seated)
    plain = ranks.shared(WORLD, train, "mlp", 2, at_stage(stage))[0]
    found = ranks.shared(WORLD, train, "mlp", 2, changes)
    assert len({digest(history) for history in found}) == 1, "ranks differ"
    for got, expected in zip(found[0].weights, plain.weights, strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor)


def between_hosts(rank: int, world: int, stage: int, gas: int) -> tuple[int, int, int]:
    case = CASES["gpt"]
    engine = engine_for(case, config_of(case, gas, merged(at_stage(stage), NESTED, GLOO)))
    outer = engine._parts.mesh["outer"].ranks
    take_step(engine, case, rank, 0, gas)
    with tapped() as calls:
        take_step(engine, case, rank, 1, gas)
    kinds = ("all_to_all_single", "broadcast")
    crossing = [call for call in calls if call.ranks == outer and call.op in kinds]
    inside = {call.ranks for call in calls if call.op in kinds} - {outer}
    assert inside == {engine._parts.mesh["inner"].ranks}, "over all ranks at once"
    reduced = sum(call.sent for call in crossing if call.op == kinds[0])
    gathered = sum(call.sent for call in crossing if call.op == kinds[1])
    elements = sum(bucket.numel for bucket in engine._parts.reduction.plan.buckets)
    keep(engine)
    return reduced, gathered, elements


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), 2])
def test_a_rank_sends_its_share_of_its_hosts_part_between_hosts_each_way(stage: int) -> None:
    for reduced, gathered, elements in ranks.shared(WORLD, between_hosts, stage, 1):
        share = 4 * elements // (WORLD // HOSTS) * (HOSTS - 1) // HOSTS
        assert (reduced, gathered) == (share, share)


def read(rank: int, world: int, changes: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    case = CASES["mlp"]
    engine = engine_for(case, config_of(case, 1, changes))
    take_step(engine, case, rank, 0)
    case.micro(engine, Moment(rank, 1, 0))
    found = {
        name: (safe_get_full_fp32_param(p), safe_get_full_grad(p))
        for name, p in engine.module.named_parameters()
    }
    keep(engine)
    return found


@pytest.mark.parametrize("seated", [NESTED, COPIES], ids=["hosts", "copies"])
def test_whole_masters_and_gradients_can_be_read(seated: Any) -> None:
    plain = ranks.shared(WORLD, read, at_stage(2))
    other = ranks.shared(WORLD, read, merged(at_stage(2), seated))
    for expected, got in zip(plain, other, strict=True):
        for name, tensors in expected.items():
            for tensor, same in zip(tensors, got[name], strict=True):
                torch.testing.assert_close(same, tensor)


def written(rank: int, world: int, changes: dict[str, Any]) -> list[Tensor]:
    """By rank 1, then by rank 2."""
    case = CASES["mlp"]
    engine = engine_for(case, config_of(case, 1, changes))
    params, found = list(engine.module.parameters()), []
    for modifier in (1, 2):
        with zerort.zero.GatheredParameters(params, modifier_rank=modifier):
            if rank == modifier:
                for parameter in params:
                    parameter.data.fill_(modifier)
        with zerort.zero.GatheredParameters(params):
            found.append(torch.cat([p.detach().reshape(-1) for p in params]).unique())
    keep(engine)
    return found


@pytest.mark.parametrize("seated", [NESTED, COPIES], ids=["hosts", "copies"])
def test_what_one_rank_writes_is_everybodys_whatever_shards_are_called(seated: Any) -> None:
    for found in ranks.shared(WORLD, written, merged(at_stage(3), seated)):
        assert [values.tolist() for values in found] == [[1.0], [2.0]]


# Checkpoints.


def saved(rank: int, world: int, folder: str, changes: dict[str, Any]) -> Any:
    """Trains, saves, trains on."""
    case = CASES["mlp"]
    engine = engine_for(case, config_of(case, 1, changes))
    take_step(engine, case, rank, 0)
    engine.save_checkpoint(folder)
    return _onward(engine, case, rank)


def resumed(rank: int, world: int, folder: str, changes: dict[str, Any]) -> Any:
    case = CASES["mlp"]
    engine = engine_for(case, config_of(case, 1, changes))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    return _onward(engine, case, rank)


def _onward(engine: Any, case: Any, rank: int) -> dict[str, Tensor]:
    take_step(engine, case, rank, 1)
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        found = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    keep(engine)
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(NESTED, NESTED, marks=SLOW),
        (NESTED, {}),
        pytest.param({}, COPIES, marks=SLOW),
        pytest.param(COPIES, {}, marks=SLOW),
        (COPIES, NESTED),
    ],
    ids=["hosts", "hosts-flat", "flat-copies", "copies-flat", "copies-hosts"],
)
def test_a_checkpoint_goes_on_however_ranks_sit(tmp_path: Path, before: Any, after: Any) -> None:
    first, then = merged(at_stage(3), before), merged(at_stage(3), after)
    expected = ranks.shared(WORLD, saved, str(tmp_path), first)[0]
    for found in ranks.shared(WORLD, resumed, str(tmp_path), then):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)


# Failures.


def poisoned(rank: int, world: int, changes: dict[str, Any]) -> str:
    engine, *_ = zerort.initialize(
        model=Sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            **merged({"zerort": {"on_nonfinite": "raise"}}, changes),
        },
    )
    gradient = gradient_of(rank, 0)
    if rank == 3:
        gradient[7] = float("nan")
    engine.backward(engine(gradient))
    with pytest.raises(NonFiniteGradient) as caught:
        engine.step()
    keep(engine)
    return str(caught.value)


@pytest.mark.parametrize("seated", [NESTED, COPIES], ids=["hosts", "copies"])
def test_the_rank_that_brought_a_nan_is_named_on_every_host(seated: Any) -> None:
    changes = merged({"zero_optimization": {"stage": 2}}, seated)
    for message in ranks.shared(WORLD, poisoned, changes):
        assert "rank 3 brought a gradient that is not finite, first in parameter long" in message


def losing_a_host(rank: int, world: int, changes: dict[str, Any]) -> tuple[str, float]:
    engine, *_ = zerort.initialize(
        model=Sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        config={"train_micro_batch_size_per_gpu": 1, **changes},
    )
    engine.backward(engine(gradient_of(rank, 0)))
    engine.step()
    dist.barrier()
    if rank >= 2:
        engine.backward(engine(gradient_of(rank, 1)))
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(CommError) as caught:
        engine.backward(engine(gradient_of(rank, 1)))
        engine.step()
        engine.backward(engine(gradient_of(rank, 2)))
        engine.step()
    engine.destroy()  # as with the end of its process: who is in a vote waits no longer
    return str(caught.value), time.monotonic() - began


def test_a_host_that_is_lost_is_named_and_nothing_hangs() -> None:
    changes = merged({"zero_optimization": {"stage": 2}}, NESTED)
    outcomes = ranks.attempt(WORLD, losing_a_host, changes, timeout=60.0, grace=5.0)
    for outcome in outcomes[:2]:
        message, took = outcome.value  # type: ignore[union-attr]
        assert "rank 2" in message or "rank 3" in message, message
        assert took < 30
