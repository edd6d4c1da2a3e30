"""What is trained in a bench: a model, its batches and its loss, the same for every contender.

Weights come from one seed and batches are a function of step and rank, so that all contenders solve
the same problem and their losses can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from gpt import GPT, Shape, next_token_loss
from naps import nap_behind

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A training problem. `draw(generator)` makes the inputs and targets of one micro-batch of
    `size` samples.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    blocks: Callable[[nn.Module], Iterable[nn.Module]]
    """What FSDP2 shards as units of their own, as its users do with a transformer's blocks."""
    size: int
    lr: float
    tolerance: float
    """By how much a loss may differ from DDP's, relative: the order of sums differs, and in bf16
    what is rounded.
    """
    dtype: torch.dtype = torch.float32
    pure: bool = False
    """Weights are in `dtype` for all contenders; else each keeps what it updates in fp32."""
    clip: float = 1.0
    muon: bool = False
    """Muon for the blocks' matrices, AdamW for the rest; else AdamW for all."""

    def model(self, device: torch.device) -> nn.Module:
        """The same weights on every call and every rank."""
        torch.manual_seed(0)
        return self.build().to(device, self.dtype if self.pure else None)

    @property
    def autocasts(self) -> bool:
        """Whether DDP computes in another dtype than its weights have."""
        return self.dtype != torch.float32 and not self.pure

    def batch(self, step: int, rank: int, device: torch.device) -> Batch:
        """The data of one rank's step."""
        inputs, targets = self.draw(torch.Generator().manual_seed(1_000_003 * step + rank))
        return inputs.to(device), targets.to(device)


# 20.5 million parameters.
SHAPE = Shape(vocabulary=1536, context=128, width=512, depth=6, heads=8)

# 124 million parameters: what a GPU computes for longer than its host takes to launch it.
LARGE = Shape(vocabulary=50304, context=1024, width=768, depth=12, heads=12)

# 110 million, of which a step on a CPU computes little: what it sends counts.
WIDE = Shape(vocabulary=16384, context=64, width=768, depth=12, heads=12)

TINY = Shape(vocabulary=1536, context=128, width=64, depth=2, heads=2)


def _tokens(generator: torch.Generator) -> Batch:
    # Skewed like words are, so that there is something to learn: a step left out shows in the next
    # loss.
    draws = torch.rand(4, SHAPE.context + 1, generator=generator)
    rows = (draws**3 * SHAPE.vocabulary).long()
    return rows[:, :-1], rows[:, 1:]


def _long_tokens(generator: torch.Generator) -> Batch:
    draws = torch.rand(8, LARGE.context + 1, generator=generator)
    rows = (draws**3 * LARGE.vocabulary).long()
    return rows[:, :-1], rows[:, 1:]


def _few_tokens(generator: torch.Generator) -> Batch:
    draws = torch.rand(1, WIDE.context + 1, generator=generator)
    rows = (draws**3 * WIDE.vocabulary).long()
    return rows[:, :-1], rows[:, 1:]


def _row_of_layers() -> nn.Module:
    layers = [nn.Linear(32, 32) for _ in range(1000)]
    for layer in layers:
        # Keeps lengths through a thousand layers; the default would let gradients shrink into
        # denormal numbers.
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers)


def _vectors(generator: torch.Generator) -> Batch:
    inputs = torch.randn(8, 32, generator=generator)
    return inputs, inputs.roll(1, dims=-1)


FORWARD, BACKWARD = 0.18, 0.32
"""Seconds that the GPT of 20 million takes for its batch on one core of two, measured alone."""


def _paced() -> nn.Module:
    """The GPT, whose layers nap for what a whole batch would take (`naps`). Its gradients are those
    of a few tokens.
    """
    model = GPT(SHAPE)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    whole = sum(layer.weight.numel() for layer in layers)
    for layer in layers:
        part = layer.weight.numel() / whole
        nap_behind(layer, part * FORWARD, part * BACKWARD)
    return model


def _prompt(generator: torch.Generator) -> Batch:
    inputs, targets = _tokens(generator)
    return inputs[:1, :8], targets[:1, :8]


GPT_FP32 = Workload(
    name="gpt",
    build=lambda: GPT(SHAPE),
    draw=_tokens,
    loss=next_token_loss,
    blocks=lambda model: model.blocks,
    size=4,
    lr=3e-4,
    tolerance=1e-4,
)

PACED = replace(GPT_FP32, name="gpt-paced", build=_paced, draw=_prompt, size=1, lr=1e-4)

SMALL = Workload(
    name="small",
    build=_row_of_layers,
    draw=_vectors,
    loss=F.mse_loss,
    blocks=lambda model: (),
    size=8,
    lr=1e-5,
    tolerance=1e-4,
)

WORKLOADS = {
    workload.name: workload
    for workload in (
        GPT_FP32,
        SMALL,
        replace(
            GPT_FP32, name="gpt-110m", build=lambda: GPT(WIDE), draw=_few_tokens, size=1, lr=1e-4
        ),
        PACED,
        replace(PACED, name="gpt-paced-bf16", dtype=torch.bfloat16, tolerance=2e-2),
        replace(GPT_FP32, name="gpt-bf16", dtype=torch.bfloat16, tolerance=5e-3),
        # Of weights of 8 bits, small updates are lost without masters: DDP learns less.
        replace(GPT_FP32, name="gpt-pure-bf16", dtype=torch.bfloat16, pure=True, tolerance=5e-2),
        # CPUs multiply fp16 matrices about a hundred times slower than fp32 ones: a model to match.
        replace(
            GPT_FP32, name="gpt-fp16", build=lambda: GPT(TINY), dtype=torch.float16, tolerance=5e-3
        ),
    )
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    # Newton-Schulz runs in bf16 and makes 5e-3 of the 1e-7 by which sums differ.
    WORKLOADS["gpt-muon"] = replace(GPT_FP32, name="gpt-muon", muon=True, tolerance=2e-2)
if torch.cuda.is_available():
    WORKLOADS["gpt-large"] = replace(
        GPT_FP32,
        name="gpt-large",
        build=lambda: GPT(LARGE),
        draw=_long_tokens,
        size=8,
        dtype=torch.bfloat16,
        tolerance=5e-3,
    )
