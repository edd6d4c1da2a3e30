"""Small models whose blocks' Hessians are known, and a record of what is computed of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import zerort
from training import at_stage, keep
from zerort.features import eigenvalue, power_iteration

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "eigenvalue.json").read_text("utf-8"))


class MlpBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class AttBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.f = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        x = x + self.o(weights @ v)
        return x + torch.tanh(self.f(x))


class Net(nn.Module):
    """inp, body.layer (a list of blocks), out; its forward gives the loss."""

    def __init__(self, block: Callable[[int], nn.Module], count: int, width: int = 4) -> None:
        super().__init__()
        self.inp = nn.Linear(width, width)
        self.body = nn.Module()
        self.body.layer = nn.ModuleList(block(width) for _ in range(count))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.inp(x)
        for block in self.body.layer:
            h = block(h)
        return (self.out(h).float() - y.float()).square().mean()


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c


class Net0(Net):
    """Block 1 enters the loss linearly."""

    def __init__(self) -> None:
        super().__init__(MlpBlock, 1)
        self.body.layer.append(Vector())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.body.layer[0](self.inp(x))
        return (self.out(h) - y).square().mean() + self.body.layer[1](h.detach()).mean()


def fill(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            i = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_((0.3 * torch.sin(0.7 * i + 0.3 * k)).reshape(p.shape))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Net(MlpBlock, 3),
    "att": lambda: Net(AttBlock, 3),
    "linear": lambda: Net(lambda width: nn.Linear(width, width), 2),
    "net0": Net0,
}


def model_of(name: str) -> nn.Module:
    return fill(MODELS[name]())


def batch(micro: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x (2, 5, 4) and y (2, 5, 2)."""
    x = torch.cos(0.37 * torch.arange(40, dtype=torch.float64)).reshape(2, 5, 4)
    y = torch.sin(0.11 * torch.arange(20, dtype=torch.float64)).reshape(2, 5, 2)
    factors = [(1.0, 1.0), (0.5, -1.0), (0.3, 0.7)][micro]
    return (factors[0] * x).to(dtype), (factors[1] * y).to(dtype)


@dataclass
class Computed:
    """Eigenvalues of blocks as they were before they were made relative."""

    raw: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)


@contextmanager
def recording(seed: int = power_iteration.SEED) -> Iterator[Computed]:
    """Within, eigenvalues are computed from a start of this seed, and recorded."""
    computed = Computed()

    def start(shapes: Sequence[torch.Size]) -> Tensor:
        return power_iteration.start_of(shapes, seed)

    def top(product: Callable[[Tensor], Tensor], start: Tensor, settings: Any) -> float:
        computed.iterations.append(0)

        def counted(vector: Tensor) -> Tensor:
            computed.iterations[-1] += 1
            return product(vector)

        found = power_iteration.top_eigenvalue(counted, start, settings)
        computed.raw.append(found)
        return found

    with (
        mock.patch.object(eigenvalue, "start_of", start),
        mock.patch.object(eigenvalue, "top_eigenvalue", top),
    ):
        yield computed


def section(blocks: int = 3, **keys: Any) -> dict[str, Any]:
    return {"enabled": True, "layer_name": "body.layer", "layer_num": blocks, **keys}


def engine_over(model: nn.Module, stage: int = 0, gas: int = 1, **config: Any) -> Any:
    """SGD without clipping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=config.pop("lr", 0.1))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,
        **at_stage(stage),
        **config,
    }
    engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
    keep(engine)
    return engine


def bits_of(engine: Any) -> dict[str, list[int]]:
    """Of all parameters, so that equal is equal to the bit."""
    return {
        name: p.detach().contiguous().view(-1).view(torch.uint8).tolist()
        for name, p in engine.module.named_parameters()
    }
