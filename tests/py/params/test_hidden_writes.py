"""Writes that no version tells of, through `.data`, into parameters that are whole for a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from catching import caught
from training import at_stage, keep, weights


class Clamping(nn.Module):
    """Keeps a weight within bounds where it uses it, as a constraint is often written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.rows: slice | None = None
        self.second.register_forward_pre_hook(self._clamp)

    def _clamp(self, module: nn.Module, args: Any) -> None:
        if self.rows is not None:
            self.second.weight.data[self.rows].clamp_(-0.01, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


def clamp(rank: int, world: int, room: int, rows: slice) -> tuple[Any, ...]:
    model = Clamping()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        **at_stage(3, stage3_max_live_parameters=room),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
    keep(engine)
    before = weights(engine)
    x = torch.ones(2, 8)

    def step() -> Exception | None:
        """The error of its backward, or of its step, which is void behind one that has failed."""
        error = caught(lambda: engine.backward(engine(x)))
        return caught(engine.step) or error

    model.rows = rows
    errors = [step()]
    unmoved = all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    model.rows = None
    errors += [step() for _ in range(4)]
    moved = not torch.equal(weights(engine)["second.weight"], before["second.weight"])
    return [str(error) if error else "" for error in errors], unmoved, moved


@pytest.mark.timeout(120)
@pytest.mark.parametrize("room", [1, 10**6], ids=["a_unit", "all"])
@pytest.mark.parametrize("rows", [slice(None), slice(7, 8)], ids=["everywhere", "on_one_rank"])
def test_it_is_named_in_the_first_step_on_all_ranks_and_training_goes_on(
    room: int, rows: slice
) -> None:
    for errors, unmoved, moved in ranks.run(2, clamp, room, rows):
        assert "second.weight was written" in errors[0] and "GatheredParameters" in errors[0]
        assert unmoved
        assert errors[1:] == [""] * 4 and moved
