"""An optimizer that is evaluated at other weights than it trains at: its own calls between the two
reach all ranks, at every stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ranks
from catching import assert_told, caught
from models import WIDTH, mlp
from terms import engine_over_terms
from training import keep, weights
from zerort.errors import StepError

RATE, SHARE = 0.5, 0.5


class Free(Optimizer):
    """As schedule-free descent: `train` and `eval` change between two points on a line."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": RATE, "training": False})

    @torch.no_grad()
    def train(self) -> None:
        self._turn(1 - 1 / (1 - SHARE), to=True)

    @torch.no_grad()
    def eval(self) -> None:
        self._turn(SHARE, to=False)

    def _turn(self, share: float, *, to: bool) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if group["training"] is not to else ():
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], share)
            group["training"] = to

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if not group["training"]:
                raise RuntimeError("it is not training")
            for parameter in group["params"]:
                if parameter.grad is not None:
                    z = self.state[parameter].setdefault("z", parameter.clone())
                    z.sub_(parameter.grad, alpha=group["lr"])
                    parameter.lerp_(z, 0.25)


def loss(model: Any, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(4, WIDTH, generator=generator)
    return model(x.to(next(model.parameters()).dtype)).float().square().sum() / 4


def seeded() -> nn.Module:
    torch.manual_seed(5)
    return mlp()


def points(rank: int, world: int, stage: int, bf16: bool) -> list[dict[str, Tensor]]:
    """Weights while training, under evaluation, and while training again."""
    model = seeded()
    engine = engine_over_terms(
        {
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 100},
            "bf16": {"enabled": bf16},
        },
        model=model,
        optimizer=Free,
    )
    engine.optimizer.train()
    for step in range(2):
        engine.backward(loss(engine, step, rank))
        engine.step()
    found = [weights(engine)]
    engine.optimizer.eval()
    found.append(weights(engine))
    with torch.no_grad():
        loss(engine, 9, rank)
    engine.optimizer.train()
    found.append(weights(engine))
    engine.backward(loss(engine, 2, rank))
    engine.step()
    found.append(weights(engine))
    keep(engine)
    return found


def plain() -> list[list[Tensor]]:
    model = seeded()
    optimizer = Free(model.parameters())
    optimizer.train()
    found = []

    def note() -> None:
        found.append([parameter.detach().clone() for parameter in model.parameters()])

    def step(at: int) -> None:
        for rank in range(2):
            (loss(model, at, rank) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)
    note()
    optimizer.eval()
    note()
    optimizer.train()
    note()
    step(2)
    note()
    return found


@pytest.mark.parametrize(
    ("stage", "bf16"), [(0, False), (0, True), (1, True), (2, False), (3, True)]
)
def test_its_own_calls_reach_every_rank(stage: int, bf16: bool) -> None:
    expected = plain()
    tolerance = 1e-2 if bf16 else 1e-5
    assert (expected[0][3] - expected[1][3]).abs().max() > 3 * tolerance
    for found in ranks.run(2, points, stage, bf16):
        for mine, theirs in zip(found, expected, strict=True):
            for value, other in zip(mine.values(), theirs, strict=True):
                torch.testing.assert_close(value.float(), other, rtol=tolerance, atol=tolerance)


def alone(rank: int, world: int) -> Exception | None:
    engine = engine_over_terms({"zero_optimization": {"stage": 1}}, model=seeded(), optimizer=Free)
    error = caught(engine.optimizer.train if rank else engine.optimizer.eval)
    keep(engine)
    return error


def test_ranks_that_make_different_calls_are_named() -> None:
    for error in ranks.run(2, alone):
        words = "rank 0 calls optimizer.eval(); rank 1 calls optimizer.train()"
        assert_told(error, StepError, "change the optimizer's weights together", words)


def test_after_the_engine_the_calls_are_its_own_again() -> None:
    engine = engine_over_terms(model=seeded(), optimizer=Free)
    optimizer = engine.optimizer
    assert isinstance(optimizer.train, partial)
    engine.destroy()
    assert not isinstance(optimizer.train, partial)
    optimizer.train()
