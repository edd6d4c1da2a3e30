"""Models whose modules are used in every odd way, trained at stage 3 beside a plain twin.

The twin is the same module, whose gradients are averaged over the ranks after the backward, and
plain SGD.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerort

RATE = 0.1
WIDTH = 16
BATCH = 4

Forward = Callable[[nn.Module, Tensor], Tensor]


def settings(room: int | None = 4000, cap: int = 1200, **more: Any) -> dict[str, Any]:
    """A configuration of stage 3 in which everything is sharded and units are small."""
    zero: dict[str, Any] = {
        "stage": 3,
        "reduce_bucket_size": cap,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 2 * cap,
    }
    if room is not None:
        zero["stage3_max_live_parameters"] = room
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0,
        "zero_optimization": zero,
        **more,
    }


def engine_over(
    model: nn.Module,
    config: dict[str, Any] | None = None,
    params: list[nn.Parameter] | None = None,
) -> Any:
    """Plain SGD over what requires grad and what does not, or over `params` alone."""
    optimizer = torch.optim.SGD(params or model.parameters(), lr=RATE)
    engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=config or settings())
    return engine


def data(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(BATCH, WIDTH, generator=generator)


def loss_of(out: Tensor) -> Tensor:
    return out if out.ndim == 0 else out.square().mean()


def twin_step(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> None:
    model.zero_grad()
    backward(loss_of(model(x)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                dist.all_reduce(gradient)
                parameter.sub_(RATE * gradient / dist.get_world_size())


def compare(engine: Any, twin: nn.Module) -> float:
    """The largest difference of a parameter."""
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        pairs = list(zip(engine.module.parameters(), twin.parameters(), strict=True))
        return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def train(
    rank: int,
    make: Callable[[], nn.Module],
    steps: int = 3,
    between: Callable[[Any, int], None] | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
    config: dict[str, Any] | None = None,
) -> Any:
    """Trains, compares with the twin, and returns the engine."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    if prepare is not None:
        prepare(model)
    engine = engine_over(model, config)
    for step in range(steps):
        x = data(step, rank)
        engine.backward(loss_of(engine(x)))
        engine.step()
        twin_step(twin, x, lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        if between is not None:
            between(engine, step)
    worst = compare(engine, twin)
    assert worst < 1e-6, f"differs by {worst}"
    return engine


class Block(nn.Module):
    """A residual block with a parameter of its own beside its children's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.down(F.gelu(self.up(self.norm(x)))) * self.scale


class Net(nn.Module):
    """Blocks in an order that the caller may change."""

    def __init__(
        self,
        blocks: int = 4,
        order: Callable[[list[int], int], list[int]] | None = None,
        reentrant: bool | None = None,
    ) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.order, self.reentrant, self.calls = order, reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        order = list(range(len(self.blocks)))
        if self.order is not None:
            order = self.order(order, self.calls)
        self.calls += 1
        for index in order:
            block = self.blocks[index]
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


class Tied(nn.Module):
    """A matrix that two modules register."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.middle = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.middle:
            x = block(x)
        return self.last(x)


class Outside(Tied):
    """Parameters that are used where their module is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.middle:
            x = block(x)
        weight = self.first.weight.t().contiguous().t()
        return F.linear(x, weight + self.first.weight) * self.middle[0].scale


class Twice(nn.Module):
    """A module that is called twice, another between its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.b(self.a(x))))


class ViewBlock(Block):
    """Its output is a view, which the caller changes in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(2, 2, WIDTH)[:, :, :]


class Views(nn.Module):
    """Outputs that are views, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ViewBlock() for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.reshape(BATCH, WIDTH))
            x += 1.0
        return self.last(x)[:1]


class Adapted(nn.Module):
    """Adapters beside a frozen base."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.base.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(2, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = torch.tanh(base(x) + up(down(x)))
        return x


class Attention(nn.Module):
    """torch's own attention, which reads its child's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]
        for layer in self.layers:
            x = layer(x)
        return x


class SideLoss(nn.Module):
    """Losses that come out beside the last output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.routers = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        side = torch.zeros(())
        for block, router in zip(self.blocks, self.routers, strict=True):
            side = side + router(x).softmax(-1).square().sum() * 0.01
            x = block(x)
        return x.square().mean() + side


class Positions(nn.Module):
    """What its call returns is a view of its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, WIDTH))
        self.first = nn.Parameter(torch.randn(WIDTH))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        return self.table[:length], self.first


class Aliases(nn.Module):
    """Views of a module's parameter, used when its call is long over."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        table, first = self.positions(BATCH)
        for block in self.blocks:
            x = block(x)
        return x * table + first


class Functional(nn.Module):
    """A module that is called with other parameters than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        other = {"weight": torch.full((WIDTH, WIDTH), 0.01)}
        return self.net(x) + torch.func.functional_call(self.net.out, other, (x,))
