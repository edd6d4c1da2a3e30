"""Models that train by adapters over a frozen base: the optimizer has the adapters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerort
from zerort.zero import GatheredParameters

WIDTH, BATCH = 16, 4


class Lora(nn.Module):
    """A frozen layer with a path of low rank beside it; one module, so one unit has both."""

    def __init__(self, outputs: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, WIDTH) / 4, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs) / 4, requires_grad=False)
        self.down = nn.Parameter(torch.randn(2, WIDTH) / 4)
        self.up = nn.Parameter(torch.randn(outputs, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.down.t() @ self.up.t()


class Block(nn.Module):
    """A frozen norm and a frozen layer around an adapted one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.adapted = Lora()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frozen(torch.tanh(self.adapted(self.norm(x))))


class Model(nn.Module):
    """Frozen at both ends, with a matrix that the first and the last module share; `reentrant`
    says how its blocks are checkpointed.
    """

    def __init__(self, blocks: int = 3, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.only_frozen = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2)))
        self.only_frozen.requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.randn(WIDTH))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.only_frozen(self.first(x))
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.last(x) + self.shift


def settings(stage: int, room: int | None = None, cap: int = 300, **more: Any) -> dict[str, Any]:
    """At stage 3 everything is sharded, and units are small."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": cap}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if room is not None:
        zero["stage3_max_live_parameters"] = room
    more = {"zerort": {"reduce_at": "micro_batch"}, **more} if stage else more
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        **more,
    }


def persistent(threshold: int) -> dict[str, Any]:
    """Stage 3, where what is no longer than `threshold` stays whole."""
    config = settings(3)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    return config


def adapters_of(model: nn.Module) -> list[nn.Parameter]:
    """What Trainers give to their optimizer."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def engine_over(model: nn.Module, config: dict[str, Any]) -> Any:
    """AdamW over what requires grad."""
    optimizer = torch.optim.AdamW(adapters_of(model), lr=0.05, eps=1e-3)
    engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def made(make: Callable[[], nn.Module] = Model, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def data(step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(BATCH, WIDTH, generator=generator).to(dtype)


def step(engine: Any, number: int, rank: int) -> None:
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(data(number, rank, dtype)).float().square().mean())
    engine.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, whole; all ranks call it."""
    with GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(engine: Any, rank: int, steps: int = 3) -> list[Any]:
    """What training comes to: the norms, and all values behind it."""
    norms = []
    for number in range(steps):
        step(engine, number, rank)
        norms.append(engine.get_global_grad_norm())
    return [norms, values(engine.module)]


def is_held(parameter: nn.Parameter) -> bool:
    """Whether its values are sharded, and not here."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.untyped_storage().nbytes() == 0


def assert_same(one: list[Any], other: list[Any]) -> None:
    """Norms and values, to the bit."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    different = [name for name in one[1] if not torch.equal(one[1][name], other[1][name])]
    assert not different, different
