"""A backward that keeps its graph (`create_graph=True`): what is packed leaves the graph behind, or
the send buffers would hold every step's.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from training import at_stage


class Kept(torch.autograd.Function):
    """The identity. Its node, and so whatever holds the graph, keeps `token` alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Any) -> Tensor:
        ctx.token = token
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 1.0, None


class Token:
    """Something to look whether it is still there."""


def living_graphs(rank: int, world: int, stage: int, dtype: str | None) -> list[int]:
    """After each of a few steps: how many of the graphs so far are still there."""
    warnings.simplefilter("ignore")  # torch warns of the cycle between a parameter and its .grad
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        **at_stage(stage),
        **({dtype: {"enabled": True}} if dtype else {}),
    }
    engine, *_ = zerort.initialize(model=model, config=config)
    tokens: list[weakref.ref[Token]] = []
    counts = []
    for _ in range(3):
        for _ in range(2):
            token = Token()
            tokens.append(weakref.ref(token))
            kind = next(model.parameters()).dtype
            loss = Kept.apply(engine(torch.ones(2, 8, dtype=kind)), token).square().mean()
            del token
            loss.backward(create_graph=True)
            del loss
            engine.step()
        gc.collect()
        counts.append(sum(token() is not None for token in tokens))
    return counts


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_no_graph_outlives_its_step(stage: int, dtype: str | None) -> None:
    assert ranks.run(1, living_graphs, stage, dtype) == [[0, 0, 0]]
