"""A backward that reaches a module's inside by a tensor that is none of its outputs: no hook on an
output tells of it, and what it reads must be there all the same, or be refused by name.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ranks
import routes
import zerort
from catching import assert_told, caught
from logged import log_lines
from routes import Block, engine_over, loss_of
from zerort.memory.guards import guards

needs_guards = pytest.mark.skipif(not guards(), reason="this torch cannot guard memory")


class Leaky(Block):
    """Keeps something of its inside beside its output; the way to it is `joined` to the other
    blocks, or ends here.
    """

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.turn = nn.Parameter(torch.randn(routes.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.tanh(x) * self.scale
        alone = torch.tanh(x.detach()) * self.scale * self.turn
        self.side = inside.square().mean() if self.joined else alone.square().mean()
        return self.down(torch.relu(self.up(self.norm(inside)))) * self.scale


class Hidden(nn.Module):
    """Its loss comes from the blocks' insides from call `since` on, and from the output before."""

    def __init__(
        self,
        since: int = 0,
        frozen: bool = False,
        joined: bool = True,
        reentrant: bool | None = None,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(routes.WIDTH, routes.WIDTH)
        self.blocks = nn.ModuleList(Leaky(joined) for _ in range(5))
        self.since, self.calls, self.reentrant = since, 0, reentrant
        for block in self.blocks[1:] if frozen else ():
            block.scale.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        self.calls += 1
        sides = torch.stack([block.side for block in self.blocks]).sum()
        return sides if self.calls > self.since else x.square().mean()


def from_the_start(rank: int) -> None:
    routes.train(rank, Hidden, steps=5)


def apart_from_the_outputs(rank: int) -> None:
    routes.train(rank, partial(Hidden, joined=False), steps=5)


def with_frozen_parameters(rank: int) -> None:
    routes.train(rank, partial(Hidden, frozen=True, joined=False), steps=5)


def checkpointed(rank: int) -> None:
    routes.train(rank, partial(Hidden, reentrant=False), steps=4)


def on_one_rank(rank: int) -> None:
    """The other rank's loss is the output's."""
    routes.train(rank, partial(Hidden, since=0 if rank else 100), steps=5)


def beside_losses_that_are_hooked(rank: int) -> None:
    """Both ways in one backward."""

    class Both(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + x.mean() * 0 + sum(block.side for block in self.blocks)

    routes.train(rank, partial(Both, since=100), steps=5)


SCENARIOS = [
    from_the_start,
    apart_from_the_outputs,
    with_frozen_parameters,
    checkpointed,
    on_one_rank,
    beside_losses_that_are_hooked,
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each.__name__, marks=[needs_guards] if each is with_frozen_parameters else [])
        for each in SCENARIOS
    ],
)
def test_it_trains_as_a_plain_module_does(name: str) -> None:
    ranks.shared(2, act, name)


def act(rank: int, world: int, name: str) -> None:
    next(each for each in SCENARIOS if each.__name__ == name)(rank)


def step(engine: Any, twin: nn.Module, rank: int, at: int) -> Exception | None:
    x = routes.data(at, rank)

    def take() -> None:
        engine.backward(loss_of(engine(x)))
        engine.step()

    error = caught(take)
    if error is None:
        routes.twin_step(twin, x, lambda loss: loss.backward())  # type: ignore[no-untyped-call]
    return error


def change_the_loss(rank: int, world: int) -> tuple[list[Exception | None], list[str]]:
    """From the fourth call on the loss is another, when lists are followed already."""
    lines = log_lines()
    torch.manual_seed(0)
    model = Hidden(since=3, joined=False)
    twin = copy.deepcopy(model)
    engine = engine_over(model, routes.settings(room=1300))
    errors = [step(engine, twin, rank, at) for at in range(3)]
    twin.calls = 100  # type: ignore[assignment]
    errors += [step(engine, twin, rank, at) for at in range(3, 7)]
    worst = routes.compare(engine, twin)
    assert worst < 1e-6, worst
    return errors, [line for line in lines if "keeps beside its outputs" in line]


@needs_guards
def test_a_program_that_changes_is_refused_once_and_then_right() -> None:
    for errors, told in ranks.shared(2, change_the_loss):
        assert len(set(told)) == len(told) > 0
        assert errors[:3] == [None] * 3
        assert errors[4:] == [None] * 3
        assert_told(errors[3], zerort.StepError, "this backward reads unit", "blocks.3", "sharded")
        assert_told(errors[3], zerort.StepError, "Return it from the module's forward")


def go_back_directly_from_the_side(rank: int, world: int) -> Exception | None:
    """Nothing announces such a backward, so nothing is brought for it."""
    torch.manual_seed(0)
    model = Hidden(since=100, joined=False)
    twin = copy.deepcopy(model)
    engine = engine_over(model, routes.settings(room=1300))
    errors = [step(engine, twin, rank, at) for at in range(2)]
    engine(routes.data(2, rank))
    error = caught(engine.module.blocks[1].side.backward)
    caught(engine.step)
    errors += [step(engine, twin, rank, at) for at in range(3, 5)]
    assert errors == [None] * 4, errors
    worst = routes.compare(engine, twin)
    assert worst < 1e-6, worst
    return error


@needs_guards
def test_a_direct_backward_from_the_side_is_refused() -> None:
    for error in ranks.shared(2, go_back_directly_from_the_side):
        assert_told(error, RuntimeError, "are sharded", "engine.backward(loss)")
