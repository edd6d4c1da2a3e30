"""Training a case with the engine, on the ranks, and comparing what comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

import zerort
from cases import CASES, DRAWN, WHOLE
from reference import (
    AS_IT_IS,
    MICRO_BATCH,
    Case,
    History,
    Moment,
    Precision,
    ReduceAt,
    Twin,
    weights_of,
)

# Elements per bucket: small, so that the smallest models have several.
SMALL_BUCKET = 150
TOLERANCE = 1e-6  # norm-relative, per tensor, in fp32

Config = dict[str, Any]

TABLE = {**CASES, **WHOLE, **DRAWN}

_KEPT: list[Any] = []


def keep(engine: Any) -> None:
    """Instead of `destroy` where that is not what is tested: the engine ends with its process.

    To destroy one is to wait for its groups' threads, most of the time of a small model.
    """
    _KEPT.append(engine)


def config_of(case: Case, accumulation: int, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a case; `changes` are merged into it, section by section."""
    base: Config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": case.clip,
        "zero_optimization": {"stage": 0, "reduce_bucket_size": SMALL_BUCKET},
    }
    for key, value in (changes or {}).items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base


def at_stage(stage: int, **more: Any) -> Config:
    """Changes that select a ZeRO stage; at the third everything is sharded."""
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **whole, **more}}


def engine_for(case: Case, config: Config) -> Any:
    """An engine over the case's model, optimizer and schedule, all from the same seed."""
    model = case.seeded_model()
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=case.optimizer,
        model_parameters=case.groups(model),
        lr_scheduler=case.scheduler,
        config=config,
    )
    return engine


def train(
    rank: int, world: int, name: str, accumulation: int, changes: Mapping[str, Any]
) -> History:
    """Runs a case of the table to its end on this rank."""
    history, engine = run(rank, name, accumulation, changes)
    engine.destroy()
    return history


def run(rank: int, name: str, accumulation: int, changes: Mapping[str, Any]) -> tuple[History, Any]:
    """A case's history, and the engine that has trained it."""
    case = TABLE[name]
    engine = engine_for(case, config_of(case, accumulation, changes))
    history = History()
    for step in range(case.steps):
        case.before(engine.module, step)
        take_step(engine, case, rank, step, accumulation)
        history.weights.append(weights(engine))
        history.norms.append(float(engine.get_global_grad_norm()))
        history.rates.append(list(engine.get_lr()))
    return history, engine


def weights(engine: Any) -> dict[str, Tensor]:
    """Copies of all parameters, whole; all ranks call it."""
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: tensor.cpu() for name, tensor in weights_of(engine.module).items()}


def take_step(engine: Any, case: Case, rank: int, step: int, accumulation: int = 1) -> None:
    """All micro-batches of one step."""
    for micro in range(accumulation):
        case.micro(engine, Moment(rank, step, micro))
        engine.step()


def train_each(
    rank: int, world: int, name: str, accumulation: int, variants: list[Config]
) -> list[History]:
    """Every variant's history, trained one after another in one group."""
    histories = []
    for variant in variants:
        history, engine = run(rank, name, accumulation, variant)
        histories.append(history)
        keep(engine)
    return histories


def train_all(
    rank: int, world: int, name: str, accumulation: int, variants: list[Config]
) -> list[str]:
    """The digest of every variant's history, trained one after another in one group."""
    return [digest(found) for found in train_each(rank, world, name, accumulation, variants)]


@cache
def twin_of(
    name: str,
    world: int,
    accumulation: int,
    precision: Precision = AS_IT_IS,
    reduce_at: ReduceAt = "micro_batch",
) -> History:
    """What the case should give."""
    return Twin(TABLE[name], world, accumulation, precision, reduce_at).train()


def digest(history: History) -> str:
    """Equal when all weights and norms are equal to the bit."""
    sha = hashlib.sha256(repr(history.norms).encode())
    for weights in history.weights:
        for name, tensor in weights.items():
            sha.update(name.encode())
            sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def assert_same(histories: list[History], expected: History, tolerance: float = TOLERANCE) -> None:
    """Every rank's weights, norms and learning rates at every step are the twin's; the ranks agree
    to the bit.
    """
    assert len({digest(history) for history in histories}) == 1, (
        "the ranks ended with different weights"
    )
    history = histories[0]
    for step, (weights, truth) in enumerate(zip(history.weights, expected.weights, strict=True)):
        assert weights.keys() == truth.keys()
        for name, tensor in weights.items():
            assert_near(tensor, truth[name], f"{name} after step {step}", tolerance)
    # Where weights may differ in a last bit of 11 or 8, the next gradient does too, by a little.
    low = any(tensor.dtype.itemsize < 4 for tensor in history.weights[0].values())
    near = (20 if low else 2) * tolerance
    for step, (norm, truth_norm) in enumerate(zip(history.norms, expected.norms, strict=True)):
        assert abs(norm - truth_norm) <= near * truth_norm, (
            f"norm of step {step}: {norm} != {truth_norm}"
        )
    assert history.rates == expected.rates


def assert_near(tensor: Tensor, truth: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Norm-relative distance within the tolerance; below fp32, a few last bits that rounded the
    other way.
    """
    assert tensor.dtype == truth.dtype and tensor.shape == truth.shape, what
    distance = (tensor.double() - truth.double()).abs()
    if tensor.dtype.itemsize < 4:
        ulp = truth.double().abs() * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).tiny
        assert (distance <= ulp).all() and (distance > 0).sum() <= 1 + tensor.numel() // 50, what
        return
    size = truth.double().norm()
    assert distance.norm() <= tolerance * size, (
        f"{what}: off by {float(distance.norm() / size):.3g}, relative"
    )
