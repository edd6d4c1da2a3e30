"""What an engine is after it has been broken off: parted from its peers for good, or as it was."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
from breaking import MayBreak
from catching import caught
from terms import engine_over_terms, step_with
from zerort.errors import CommError, StepError

pytestmark = pytest.mark.timeout(60)


def _outlive_a_peer(rank: int, world: int, where: str) -> list[str]:
    """What a rank hears that is out of data, or goes on, when its peer is killed within `join`."""
    engine = engine_over_terms({"zerort": {"timeout": 5}})
    step_with(engine, 1.0, 1.0)

    def train() -> None:
        with engine.join():
            if where == "at its step":
                engine.backward(engine(1.0, 1.0))
                engine._transaction.part.reduction.drain()
                dist.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if where == "at its step":
                engine.step()

    return [str(caught(train)), str(caught(lambda: step_with(engine, 1.0, 1.0)))]


@pytest.mark.parametrize("where", ["out of data", "at its step"])
def test_a_rank_that_has_lost_a_peer_within_join_says_so_from_then_on(where: str) -> None:
    survivor, _ = ranks.attempt(2, _outlive_a_peer, where)
    assert isinstance(survivor, ranks.Returned), survivor
    first, then = survivor.value
    assert "rank 1 (process" in first
    assert "after ranks have parted" in then and "rank 1 (process" in then


def test_an_interrupt_while_a_failure_is_settled_parts_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_over_terms(model=MayBreak())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._parts.boundary, "cross", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.backward(engine(1.0, 1.0, breaks=True))
    with pytest.raises(
        CommError, match="KeyboardInterrupt before the others had heard of: ArithmeticError"
    ):
        engine.backward(engine(1.0, 1.0))
    engine.destroy()


def test_a_step_that_is_void_has_not_been_applied() -> None:
    engine = engine_over_terms(model=MayBreak())
    step_with(engine, 1.0, 1.0)
    assert engine.was_step_applied()
    with pytest.raises(ArithmeticError):
        engine.backward(engine(1.0, 1.0, breaks=True))
    engine.step()
    assert not engine.was_step_applied()
    engine.destroy()


class _Forward(nn.Module):
    """Raises on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4))

    def forward(self, a: float | None) -> Tensor:
        if a is None:
            raise ArithmeticError("the user's own")
        return a * self.a.sum()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_a_forward_that_raises_changes_nothing(grad: bool) -> None:
    engine = engine_over_terms(model=_Forward())
    loss = engine(1.0)
    with torch.set_grad_enabled(grad), pytest.raises(ArithmeticError):
        engine(None)
    engine.backward(loss)
    engine.step()
    assert engine.module.a.tolist() == [-1.0] * 4
    engine.destroy()


@pytest.mark.parametrize(
    "call",
    [lambda engine: engine.zero_grad(), lambda engine: engine.set_train_batch_size(2)],
    ids=["zero_grad", "set_train_batch_size"],
)
def test_what_a_backward_has_begun_is_not_changed_from_within_it(call: Any) -> None:
    engine = engine_over_terms()
    engine.module.b.register_hook(lambda _: call(engine))
    with pytest.raises(StepError, match="wait until it is over"):
        engine.backward(engine(64.0, 64.0))
    engine.step()
    engine.module.b._backward_hooks.clear()
    assert step_with(engine, 2.0, 4.0) == (-2.0, -4.0)
    engine.destroy()
