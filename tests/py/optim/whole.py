"""A model with matrices of many shapes, and what trains it on ranks and in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerort
from reference import MICRO_BATCH, Moment
from training import weights

VOCABULARY = 24
MUON = {"type": "Muon", "params": {"lr": 0.05, "adam_lr": 3e-3, "weight_decay": 0.01}}
ADAFACTOR = {"type": "Adafactor", "params": {"lr": 0.01}}
SMALL = 1500  # elements of a bucket
PADDINGS = {"owned": 20.0, "exchanged": 0.0}
"""What lets every bucket go a way; one that needs no padding is owned all the same."""


class Shapes(nn.Module):
    """(batch, length) token ids -> the mean cross entropy of the next; matrices tall, wide, square
    and transposed, a convolution, vectors, a scalar, an empty parameter, one that is not used, and
    a frozen one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 12)
        self.conv = nn.Conv1d(12, 20, 3, padding=1)
        self.tall = nn.Linear(20, 70)
        self.wide = nn.Linear(70, 16)
        self.square = nn.Linear(16, 16, bias=False)
        self.transposed = nn.Parameter((torch.randn(10, 16) * 0.2).t())
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.empty(0, 5))
        self.unused = nn.Linear(9, 33)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.tokens(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.wide(torch.tanh(self.tall(x)))
        x = self.gain * torch.tanh(x + self.square(x)) @ self.transposed
        logits = self.head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def seeded() -> Shapes:
    torch.manual_seed(11)
    return Shapes()


def tokens(at: Moment) -> Tensor:
    return at.tokens(VOCABULARY, MICRO_BATCH, 9)


def engine_of(
    stage: int, optimizer: Any = None, accumulation: int = 1, way: str = "owned", **changes: Any
) -> Any:
    """An engine over `Shapes`; `changes` replace sections of the configuration."""
    zero = {"stage": stage, "reduce_bucket_size": SMALL, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        **changes,
        "zerort": {
            "whole_padding": PADDINGS[way],
            "reduce_at": "micro_batch",
            **changes.get("zerort", {}),
        },
        "zero_optimization": {**zero, **changes.get("zero_optimization", {})},
    }
    given = {}
    if isinstance(optimizer, Mapping) or optimizer is None:
        config["optimizer"] = MUON if optimizer is None else optimizer
    else:
        given = {"optimizer": optimizer}
    return zerort.initialize(model=seeded(), config=config, **given)[0]


def train(engine: Any, rank: int, steps: int = 2, first: int = 0) -> None:
    """Whole steps, with all their micro-batches."""
    accumulation = engine.gradient_accumulation_steps()
    for step in range(first, first + steps):
        for micro in range(accumulation):
            engine.backward(engine(tokens(Moment(rank, step, micro))))
            engine.step()


def flat(engine: Any) -> Tensor:
    """All weights in one, on all ranks together."""
    return torch.cat([value.reshape(-1) for value in weights(engine).values()])


@contextmanager
def counted() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what torch's Muon orthogonalises within."""
    module: Any = torch.optim._muon
    inner, seen = module._zeropower_via_newtonschulz, []

    def counting(gradient: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(gradient.shape))
        return inner(gradient, *rest)

    module._zeropower_via_newtonschulz = counting
    try:
        yield seen
    finally:
        module._zeropower_via_newtonschulz = inner
