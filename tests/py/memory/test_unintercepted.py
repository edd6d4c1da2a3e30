"""A parameter whose class has a `__torch_function__` is asked in the user's code alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerort


class Counting(nn.Parameter):
    """Counts what is done with it, while that is wanted."""

    asked: list[str] | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Counting.asked is not None:
            Counting.asked.append(getattr(func, "__qualname__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@contextmanager
def _asked() -> Iterator[list[str]]:
    Counting.asked = found = []
    yield found
    Counting.asked = None


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    for part in model.modules():
        for name, parameter in list(part._parameters.items()):
            part._parameters[name] = Counting(parameter.data)  # type: ignore[union-attr]
    return model


def _engine(stage: int, **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 30},
        **more,
    }
    return zerort.initialize(model=_model(), config=config)[0]


def _loss(engine: Any) -> Tensor:
    dtype = engine.module[0].weight.dtype
    loss: Tensor = engine(torch.randn(2, 4, dtype=dtype)).square().mean()
    return loss


def _train(engine: Any, asked: list[str]) -> None:
    """Three steps, the first micro-batch of each under no_sync, and another backward of the user's
    own in the second; a layer is frozen on the way.
    """
    for step in range(3):
        engine.module[2].requires_grad_(step != 1)
        with engine.no_sync():
            loss = _loss(engine)
            with _asked() as found:
                engine.backward(loss)
            asked += found
        for micro in range(2):
            loss = _loss(engine) if micro else engine.scale(_loss(engine))
            with _asked() as found:
                engine.backward(loss) if micro else loss.backward()
                engine.step()
            asked += found


@pytest.mark.parametrize("changes", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_backward_and_step_ask_no_parameters_class(stage: int, changes: dict[str, Any]) -> None:
    asked: list[str] = []
    engine = _engine(stage, **changes)
    _train(engine, asked)
    engine.destroy()
    assert engine.global_steps == 3
    assert asked == []


def test_a_backwards_own_function_asks_it_as_ever() -> None:
    """What a reentrant checkpoint computes anew is the user's code."""

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _model()

        def forward(self, x: Tensor) -> Tensor:
            again: Tensor = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)
            return again

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = zerort.initialize(model=Recomputed(), config=config)
    loss = engine(torch.randn(2, 4, requires_grad=True)).square().mean()
    with _asked() as found:
        engine.backward(loss)
    engine.step()
    engine.destroy()
    assert found.count("linear") == 3
