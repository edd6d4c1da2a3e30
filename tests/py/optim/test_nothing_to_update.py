"""Ranks, groups and buckets that hold nothing to update: they step like all the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import zerort
from models import WIDTH
from training import keep

WIDE = 64


class Backbone(nn.Sequential):
    """A frozen layer that fills the first rank's shard or more of the only bucket, and a small
    head.
    """

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 2))
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)
        self[0].requires_grad_(False)


def start(model: nn.Module, stage: int, clip: float = 0.0, **arguments: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
    }
    return zerort.initialize(model=model, config=config, **arguments)[0]


def step(engine: Any, size: int = WIDE) -> None:
    engine.backward(100 * engine(torch.ones(4, size)).square().mean())
    engine.step()


def cloned(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_hand(make: Callable[[Any], torch.optim.Optimizer], clip: float) -> list[Tensor]:
    """The same on one process without an engine."""
    model = Backbone()
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        (100 * model(torch.ones(4, WIDE)).square().mean()).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return cloned(model)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, eps=1e-3, fused=True)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.001, momentum=0.9)


def adagrad(params: Any) -> torch.optim.Optimizer:
    """It makes state in its constructor."""
    return torch.optim.Adagrad(params, lr=0.01)


MAKERS = {make.__name__: make for make in (adamw, sgd, adagrad)}
CASES = [
    (stage, clip, name) for stage in (0, 1, 2) for clip in (0.0, 1.0) for name in sorted(MAKERS)
]


def train_the_head(rank: int, world: int) -> dict[tuple[int, float, str], list[Tensor]]:
    trained = {}
    for case in CASES:
        stage, clip, name = case
        engine = start(Backbone(), stage, clip, optimizer=MAKERS[name])
        for _ in range(3):
            step(engine)
        trained[case] = cloned(engine.module)
        keep(engine)
    return trained


@ranks.once(None)
def heads() -> list[dict[tuple[int, float, str], list[Tensor]]]:
    return ranks.shared(2, train_the_head)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_backbone_frozen_from_the_start_may_fill_a_ranks_shard(
    case: tuple[int, float, str],
) -> None:
    _, clip, name = case
    expected = by_hand(MAKERS[name], clip)
    for trained in heads():
        for value, truth in zip(trained[case], expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)


# ---- more ranks than there is to share


class Three(nn.Module):
    """Three parameters of one, zero and two elements."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(()))
        self.none = nn.Parameter(torch.zeros(0, 5))
        self.two = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean() * (self.one + self.none.sum() + self.two.sum())


def freeze_and_thaw(rank: int, world: int, clip: float) -> list[list[float]]:
    """A step with everything, one in which the only rank with elements has none that trains but
    one.
    """
    seen = []
    for stage in (0, 1, 2):
        model = Three()
        engine = start(model, stage, clip, optimizer=sgd)
        for frozen in ((), (model.two,), (model.one, model.none), ()):
            for parameter in model.parameters():
                parameter.requires_grad_(all(parameter is not other for other in frozen))
            engine.backward(engine(torch.ones(4)))
            engine.step()
        seen.append([*model.two.tolist(), model.one.item()])
        keep(engine)
    return seen


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_four_ranks_share_a_model_of_three_elements(clip: float) -> None:
    found = ranks.shared(4, freeze_and_thaw, clip)
    assert all(rows == found[0] for rows in found)
    assert found[0][0] == found[0][1] == found[0][2]
    if not clip:
        # momentum 0.9: steps of 1, 1.9 and, its own step left out, 2.71 times the learning rate
        assert found[0][0] == pytest.approx([-0.001 * (1 + 1.9 + 2.71)] * 3)


# ---- groups and buckets


class Empties(nn.Module):
    """A layer, and parameters without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.empty = nn.Parameter(torch.zeros(0))
        self.other = nn.Parameter(torch.zeros(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.empty.sum() + self.other.sum()


def train_empties(rank: int, world: int, kind: str) -> None:
    for stage in (0, 2):
        model = Empties()
        groups = [
            {"params": list(model.layer.parameters())},
            {"params": [model.empty, model.other], "lr": 0.5},
            {"params": []},
        ]
        before = cloned(model)
        engine = start(model, stage, 0.1, optimizer=MAKERS[kind](groups))
        step(engine, WIDTH)
        model.layer.bias.requires_grad_(False)
        step(engine, WIDTH)
        assert not torch.equal(before[2], model.layer.weight)
        keep(engine)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_group_may_hold_no_element_or_no_parameter(kind: str) -> None:
    ranks.shared(2, train_empties, kind)


def resume_the_head(rank: int, world: int, kind: str) -> None:
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    engine = start(Backbone(), 2, 1.0, optimizer=MAKERS[kind])
    step(engine)
    engine.save_checkpoint(folder[0])
    step(engine)
    expected = cloned(engine.module)
    engine.destroy()
    engine = start(Backbone(), 2, 1.0, optimizer=MAKERS[kind])
    engine.load_checkpoint(folder[0])
    step(engine)
    assert all(map(torch.equal, cloned(engine.module), expected))


@pytest.mark.parametrize("kind", ["adamw", "adagrad"])
def test_a_rank_with_nothing_to_update_saves_and_resumes(kind: str) -> None:
    ranks.shared(2, resume_the_head, kind)
