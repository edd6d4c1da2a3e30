"""Engines whose steps are monitored, and what their monitors hold."""

from __future__ import annotations

import csv
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerort
from zerort.features import monitors
from zerort.features.monitors import Event, Kind

LR, LOSS, SCALE = "Train/Samples/lr", "Train/Samples/train_loss", "Train/Samples/loss_scale"
CSV = {"csv_monitor": {"enabled": True, "job_name": "job"}}
BOTH = {**CSV, "tensorboard": {"enabled": True, "job_name": "job"}}

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs zerort[tensorboard]"
)


def engine_over(config: Any, model: nn.Module | None = None, **more: Any) -> Any:
    model = nn.Linear(4, 4) if model is None else model
    config = {"train_micro_batch_size_per_gpu": 2, **config}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return zerort.initialize(model=model, optimizer=optimizer, config=config, **more)[0]


def window(engine: Any, draw: torch.Generator | None = None) -> list[float]:
    """One window; returns its losses."""
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        loss = engine(torch.randn(2, 4, generator=draw)).square().mean()
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    return losses


def rows(folder: Path, name: str) -> list[list[str]]:
    path = folder / f"{name.replace('/', '_')}.csv"
    with path.open(newline="") as file:
        return list(csv.reader(file))


def values(folder: Path, name: str) -> list[tuple[int, float]]:
    """What stands below the header."""
    header, *rest = rows(folder, name)
    assert header == ["step", name.rpartition("/")[2]]
    return [(int(step), float(value)) for step, value in rest]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports is its own affair
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        shown = EventAccumulator(str(folder))
        shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(name)]


class Noted:
    """A member that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def write(self, events: Sequence[Event]) -> None:
        self.events += events

    def close(self) -> None:
        self.closed += 1

    def of(self, name: str) -> list[float]:
        return [event.value for event in self.events if event.name == name]


def monitored(
    monkeypatch: Any, *members: Any, config: Any = None, model: nn.Module | None = None
) -> Any:
    """An engine whose only monitors are these."""
    on = SimpleNamespace(enabled=True)
    table = {
        f"member {i}": Kind(lambda _: on, lambda _, m=member: m, lambda _: None)
        for i, member in enumerate(members)
    }
    monkeypatch.setattr(monitors, "MEMBERS", table)
    return engine_over(config or {}, model)


class Scaled(nn.Module):
    """The loss is what it is given, times a weight of one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: float) -> Tensor:
        return self.weight * x


def micro(engine: Any, loss: float) -> None:
    engine.backward(engine(loss))
    engine.step()


FROZEN = {"gradient_accumulation_steps": 2, "gradient_clipping": 1e-6}
"""Weights hardly move, so that a loss is what the test says."""
