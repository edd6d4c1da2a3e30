"""How long buckets become where nobody has said it: the rule, and engines that follow it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import forecasted
import ranks
import zerort
from zerort.config import load
from zerort.start.caps import Cap
from zerort.tune.feature import plan_of, present_setting

MIB = 1 << 20
GPT = (20_488_192, "f32", 0, 0)


def cap(params: Any, world: int, stage: int = 2, **config: Any) -> tuple[int | None, str | None]:
    settings = load({"zero_optimization": {"stage": stage}, **config})
    found = Cap.of(settings, params, world)
    return found.nbytes, found.reason


TENTH = "a tenth of the trained parameters"


@pytest.mark.parametrize(
    ("params", "world", "stage", "nbytes", "reason"),
    [
        ([(1000, "f32", 0, 0)], 2, 2, MIB, "the least"),
        ([], 1, 0, MIB, "the least"),
        ([GPT], 2, 0, 8_195_276, TENTH),
        ([GPT], 2, 2, 8_195_276, TENTH),
        ([GPT], 1, 1, 8_195_276, TENTH),
        ([(20_488_192, "bf16", 0, 0)], 2, 2, 4_097_638, TENTH),
        ([GPT, (7_000_000_000, "bf16", None, 0)], 2, 2, 8_195_276, TENTH),
        ([GPT], 128, 2, 16 * MIB, "128 KiB for each rank"),
        ([GPT], 256, 2, 25 * MIB, "the most"),
        ([(7_000_000_000, "bf16", 0, 0)], 2, 2, 25 * MIB, "the most"),
        ([GPT], 2, 3, 25 * MIB, "as much as a unit"),
    ],
)
def test_a_bucket_is_a_tenth_of_what_is_trained_within_bounds(
    params: Any, world: int, stage: int, nbytes: int, reason: str
) -> None:
    found, why = cap(params, world, stage)
    assert found == nbytes
    assert why is not None and why.startswith(reason)


def test_a_size_that_is_given_is_the_size() -> None:
    assert cap([GPT], 2, zerort={"bucket_bytes": 77}) == (77, None)
    settings = load({"zero_optimization": {"reduce_bucket_size": 5}})
    assert Cap.of(settings, [GPT], 2) == Cap(None, 5)
    assert Cap.of(settings, [GPT], 2).numel(4) == 5
    assert Cap(77).numel(4) == 19
    assert Cap(3).numel(4) == 1


def config(stage: int, **runtime: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
        "zerort": {"transport": "gloo", **runtime},
        "log_level": "info",
    }


def trained(engine: Any, rank: int, steps: int) -> None:
    for step in range(steps):
        drawn = torch.Generator().manual_seed(2 * step + rank)
        batch = torch.randn(1, forecasted.WIDTH, generator=drawn)
        engine.backward(engine(batch).square().mean())
        engine.step()


def started(rank: int, world: int, model: str, stage: int) -> Any:
    """Buckets of an engine, its longest one, what is logged of them, and whether what tuning takes
    for present is what there is.
    """
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listening, log = Listening(), logging.getLogger("zerort")
    log.addHandler(listening)
    try:
        engine = zerort.initialize(model=getattr(forecasted, model)(), config=config(stage))[0]
    finally:
        log.removeHandler(listening)
    trained(engine, rank, 2)
    plan = engine._parts.reduction.plan
    present = present_setting(engine._parts)
    again = stage == 3 or len(plan_of(engine._parts, present).buckets) == len(plan.buckets)
    found = len(plan.buckets), 4 * max(b.numel for b in plan.buckets), plan.cap_bytes
    engine.destroy()
    return found, [line for line in said if line.startswith("buckets have")], again


@pytest.mark.parametrize("stage", range(4))
def test_an_engine_follows_it_and_says_so(stage: int) -> None:
    (found, said, again), (other, nothing, _) = ranks.shared(2, started, "long", stage)
    assert found == other and again
    numel = sum(p.numel() for p in forecasted.long().parameters())
    most = 25 * MIB if stage == 3 else 4 * numel // 10
    # at stage 3 one unit, and biases, which stay whole
    assert found[0] == (2 if stage == 3 else 13)
    assert found[1] <= found[2] == most
    reason = "as much as a unit" if stage == 3 else TENTH
    assert said == [
        f"buckets have at most {most} bytes, {reason}; zerort.bucket_bytes says another size"
    ]
    assert nothing == []


def test_a_small_model_is_one_bucket() -> None:
    for found, _, _ in ranks.shared(2, started, "make", 2):
        assert found[0] == 1


def resumed(rank: int, world: int, folder: str) -> Any:
    """Weights after a step behind a checkpoint, with one bucket and with as many as there are by
    default.
    """
    one = zerort.initialize(model=forecasted.long(), config=config(2, bucket_bytes=25 * MIB))[0]
    trained(one, rank, 2)
    one.save_checkpoint(folder, "t")
    many = zerort.initialize(model=Other(), config=config(1))[0]
    many.load_checkpoint(folder, "t")
    found = []
    for engine in (one, many):
        trained(engine, rank, 1)
        weights = [p.detach().clone() for p in engine.module.parameters()]
        found.append((len(engine._parts.reduction.plan.buckets), weights))
        engine.destroy()
    return found


class Other(nn.Sequential):
    """The same model with other values."""

    def __init__(self) -> None:
        super().__init__(*forecasted.long())  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(1)


def test_a_checkpoint_of_fixed_buckets_goes_on_in_those_of_the_model(tmp_path: Any) -> None:
    for (one, there), (many, here) in ranks.shared(2, resumed, str(tmp_path)):
        assert (one, many) == (1, 13)
        for expected, got in zip(there, here, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
