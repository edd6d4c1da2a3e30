"""Constructors that do things drawn at random build the same model within `zero.Init`."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn

import ranks
from zerort.zero import GatheredParameters, Init

PROGRAMS = 40
SIZES = [(4, 4), (4, 6), (6, 4), (3, 1), (1, 1)]


class Drawn(nn.Module):
    """Makes modules, and changes those that it has made, as `seed` says."""

    def __init__(self, seed: int, depth: int = 2) -> None:
        super().__init__()
        self.draw = draw = random.Random(seed)
        self.parts = nn.ModuleList()
        self.aliases: list[Tensor] = []
        for number in range(draw.randint(2, 6)):
            if depth and draw.random() < 0.25:
                self.parts.append(Drawn(draw.randrange(10**6), depth - 1))
            else:
                self.parts.append(nn.Linear(*draw.choice(SIZES), bias=draw.random() < 0.7))
            if draw.random() < 0.3:
                setattr(self, f"own_{number}", nn.Parameter(torch.randn(draw.randint(1, 5))))
            for _ in range(draw.randint(0, 4)):
                self._change()
        self.aliases.clear()

    def _parameter(self) -> nn.Parameter:
        return self.draw.choice(list(self.parameters()))

    @torch.no_grad()
    def _change(self) -> None:
        getattr(self, "_" + self.draw.choice(CHANGES))(self._parameter())

    def _start(self, p: nn.Parameter) -> None:
        nn.init.normal_(p, std=0.2)

    def _scale(self, p: nn.Parameter) -> None:
        p.data.mul_(self.draw.choice([0.5, 2.0]))

    def _row(self, p: nn.Parameter) -> None:
        p[self.draw.randrange(len(p))].fill_(0.25)

    def _item(self, p: nn.Parameter) -> None:
        p[-1] = 3.0

    def _other(self, p: nn.Parameter) -> None:
        p.add_(self._parameter().mean())

    def _normed(self, p: nn.Parameter) -> None:
        p.div_(p.norm() + 1)

    def _cumulated(self, p: nn.Parameter) -> None:
        p.copy_(p.cumsum(0))

    def _replaced(self, p: nn.Parameter) -> None:
        p.data = p.data.clone() * 2

    def _frozen(self, p: nn.Parameter) -> None:
        p.requires_grad_(False)

    def _read(self, p: nn.Parameter) -> None:
        self.register_parameter(f"read_{len(self._parameters)}", nn.Parameter(p.flatten()[:2] + 1))

    def _tied(self, p: nn.Parameter) -> None:
        self.register_parameter(f"tied_{len(self._parameters)}", p)

    def _alias(self, p: nn.Parameter) -> None:
        self.aliases.append(p.data[:1])

    def _through_alias(self, p: nn.Parameter) -> None:
        for alias in self.aliases[-2:]:
            alias.add_(0.125)

    def _copied(self, p: nn.Parameter) -> None:
        if len(self.parts) < 9:
            self.parts.append(copy.deepcopy(self.draw.choice(list(self.parts))))

    def _wide(self, p: nn.Parameter) -> None:
        self.draw.choice(list(self.parts)).double().float()

    def _vector(self, p: nn.Parameter) -> None:
        own = list(self.draw.choice(list(self.parts)).parameters())
        vector = nn.utils.parameters_to_vector(own)
        nn.utils.vector_to_parameters(vector + 1, own)


CHANGES = [
    "start",
    "scale",
    "row",
    "item",
    "other",
    "normed",
    "cumulated",
    "replaced",
    "frozen",
    "read",
    "tied",
    "alias",
    "through_alias",
    "copied",
    "wide",
    "vector",
]


def built(rank: int, world: int) -> list[Any]:
    wrong = []
    for seed in range(PROGRAMS):
        torch.manual_seed(seed)
        want = Drawn(seed)
        torch.manual_seed(seed + 1000 * rank)
        with Init():
            model = Drawn(seed)
        params = dict(model.named_parameters(remove_duplicate=False))
        wanted = dict(want.named_parameters(remove_duplicate=False))
        assert params.keys() == wanted.keys(), seed
        with GatheredParameters(list(model.parameters())):
            wrong += [
                (seed, name)
                for name, p in params.items()
                if not torch.equal(p, wanted[name]) or p.requires_grad != wanted[name].requires_grad
            ]
        ties = [[a is b for b in params.values()] for a in params.values()]
        if ties != [[a is b for b in wanted.values()] for a in wanted.values()]:
            wrong.append((seed, "ties"))
    return wrong


def test_whatever_a_constructor_does_the_model_is_the_same() -> None:
    assert ranks.run(2, built, timeout=120) == [[], []]
