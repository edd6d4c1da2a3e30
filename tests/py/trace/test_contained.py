"""An observer that raises: a sink, a watch, a handler of the log. The step goes on on every rank,
and the error is said once.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ranks
import zerort
from zerort.trace import SINKS, NullSink
from zerort.trace.contained import ContainedSink
from zerort.trace.watch import BucketWatch


class Broken(NullSink):
    """A sink of which every call raises."""

    enabled = True

    def __init__(self, *_: Any) -> None:
        """Takes what a row of `SINKS` is given."""

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise ValueError("the listener is broken")

    mark = range = span = wait = life = counter = step = flush = close = _raise


class BrokenRange(NullSink):
    """A sink whose ranges raise when they are left."""

    @contextmanager
    def range(self, name: str) -> Any:
        yield
        raise ValueError("the listener is broken")


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Deaf(logging.Handler):
    """A handler that raises."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("the handler is broken")


def train(model: nn.Module, stage: int) -> list[float]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 64},
        "zerort": {"window": 1, "trace": {"enabled": True, "path": "trace.json"}},
    }
    engine, *_ = zerort.initialize(model=model, config=config)
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 8)).square().mean())
        engine.step()
    engine.destroy()
    return [float(p.detach().sum()) for p in model.parameters()]


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def broken_on_one_rank(rank: int, world: int, folder: str, what: str) -> Any:
    """Weights after three steps, and what was said; something broken looks on at rank 1."""
    zerort_log = logging.getLogger("zerort")
    heard = Heard()
    zerort_log.addHandler(heard)
    zerort_log.setLevel(logging.INFO)
    if rank == 1 and what == "sink":
        SINKS["chrome"] = Broken  # type: ignore[assignment]
    if rank == 1 and what == "watch":
        BucketWatch.launched = BucketWatch.started = Broken._raise  # type: ignore[assignment]
    if what == "log":
        zerort_log.addHandler(Deaf())
    os.chdir(folder)
    weights = train(model_of(), 2)
    return weights, [line for line in heard.lines if "only observes" in line]


@pytest.mark.parametrize("what", ["sink", "watch", "log"])
def test_an_observer_that_raises_breaks_no_step_and_is_said_once(what: str, tmp_path: Path) -> None:
    quiet, broken = (
        ranks.run(2, broken_on_one_rank, str(tmp_path), case) for case in ("nothing", what)
    )
    assert [weights for weights, _ in broken] == [weights for weights, _ in quiet]
    assert [len(said) for _, said in broken] == [0, {"sink": 1, "watch": 1, "log": 0}[what]]
    assert all("listener is broken" in line for _, said in broken for line in said)


def test_what_the_block_of_a_range_raises_is_raised_still() -> None:
    sink = ContainedSink(BrokenRange())
    with sink.range("forward"):
        pass
    with pytest.raises(KeyError, match="mine"), sink.range("forward"):
        raise KeyError("mine")


def test_ctrl_c_is_not_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    inner = NullSink()
    monkeypatch.setattr(inner, "step", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        ContainedSink(inner).step(1)
