"""Engines of two ranks whose updated parameters arrive late on rank 0: rank 1 sends them late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import zerort
from zerort.run.publication import Publication

WIDTH, LAYERS = 16, 4
LATE = 0.01


class Named(nn.Parameter):
    """A parameter of a class of its own."""

    def doubled(self) -> Tensor:
        return self * 2


def row() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    model[1].weight = Named(model[1].weight.detach().clone())
    return model


def engine_of(publish: str, model: nn.Module | None = None, stage: int = 2, **zero: Any) -> Any:
    """A bucket for each layer of `row`."""
    model = model or row()
    size = {"stage": stage, "reduce_bucket_size": WIDTH * WIDTH, **zero}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": size,
        "zerort": {"publish": publish, "timeout": 20.0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return zerort.initialize(model=model, optimizer=optimizer, config=config)[0]


def data(rank: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(rank))


def step(engine: Any, rank: int) -> None:
    engine.backward(engine(data(rank)).square().mean())
    engine.step()


@contextmanager
def sending_late(rank: int, seconds: float = LATE) -> Iterator[None]:
    """Within, rank 1 sends each bucket later than rank 0."""
    send = Publication._send

    def late(self: Publication, flight: Any) -> Any:
        if rank == 1 and flight.state.work is None:
            time.sleep(seconds)
        return send(self, flight)

    with mock.patch.object(Publication, "_send", late):
        yield


def under_way(engine: Any) -> set[int]:
    return set(engine._parts.reduction.executor.publication._turn[1])
