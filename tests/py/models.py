"""Small models, each odd in one way."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8
VOCABULARY = 32


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def mlp() -> nn.Module:
    """(batch, WIDTH) -> (batch, WIDTH), two layers."""
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


def partly_frozen() -> nn.Module:
    """An MLP whose first layer does not train."""
    model = mlp()
    model[0].requires_grad_(False)
    return model


class Tied(nn.Module):
    """A matrix used under two names, by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Branches(nn.Module):
    """Four layers of equal shape; the caller says which of them run, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, order: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
        return sum((torch.tanh(self.branches[i](x)) for i in order), start=torch.zeros_like(x))


class DrawnBranches(Branches):
    """Up to eight branches of random widths, some frozen; two may share their first layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        widths = [draw.choice([1, 3, 8, 16, 33]) for _ in range(draw.randint(2, 8))]
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, WIDTH))
            for width in widths
        )
        if widths[0] == widths[-1]:
            self.branches[-1][0] = self.branches[0][0]
        for branch in self.branches[1:]:
            branch.requires_grad_(draw.random() < 0.8)


class OddShapes(nn.Module):
    """A scalar, an empty, a transposed and a strided parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.transposed = nn.Parameter(torch.randn(3, WIDTH).t() * 0.3)
        self.strided = nn.Parameter((torch.randn(3, 2 * WIDTH) * 0.3)[:, ::2])

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x @ self.transposed @ self.strided) + self.empty.sum()


class MixedDtypes(nn.Module):
    """Layers in fp32, bf16 and fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.in_fp32 = nn.Linear(WIDTH, WIDTH)
        self.in_bf16 = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.in_fp64 = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.in_fp64(self.in_bf16(self.in_fp32(x).bfloat16()).double())


class Reused(nn.Module):
    """One layer used several times in a forward, plainly or under activation checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)
        self.outside = nn.Linear(WIDTH, WIDTH)
        self.reentrant = reentrant

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        x = self.outside(x)
        for _ in range(times):
            x = (
                self._block(x)
                if self.reentrant is None
                else checkpoint(self._block, x, use_reentrant=self.reentrant)
            )
        return x

    def _block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inside(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 4 * WIDTH)
        self.contract = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.gelu(self.expand(self.norm(x))))


class Checkpointed(nn.Module):
    """Residual blocks, each recomputed in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(2 * WIDTH, 6 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(2 * WIDTH) for _ in range(2))
        self.attention = _Attention()
        self.mlp = nn.Sequential(
            nn.Linear(2 * WIDTH, 8 * WIDTH), nn.GELU(), nn.Linear(8 * WIDTH, 2 * WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class TinyGPT(nn.Module):
    """(batch, length <= 16) token ids -> the mean cross entropy of the next token; embedding and
    head are tied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 2 * WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.position = nn.Parameter(torch.randn(16, 2 * WIDTH) * 0.1)
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.reshape(-1, VOCABULARY).float(), tokens[:, 1:].reshape(-1))


class _AllReduceBackward(torch.autograd.Function):
    """The identity, with a collective on the default group in its backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * _share_of_ranks_present()


def _share_of_ranks_present() -> Tensor:
    """1.0 if a collective pairs with the peers' same collective, something else if it pairs with
    another.
    """
    count = torch.ones(())
    if dist.is_initialized():
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count


class WithCollective(nn.Module):
    """Layers with a collective of the user's own between them in the backward; one layer may be
    left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, without: int | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = _AllReduceBackward.apply(x)
            if i != without:
                x = torch.tanh(layer(x))
        return x


class Terms(nn.Module):
    """A loss that is linear in two vectors of zeros: SGD at rate 1 takes the weights to minus the
    gradient.

    `forward(a, b)` is `a * sum(self.a) + b * sum(self.b)`; a coefficient of None leaves its vector
    out of the graph.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(4, dtype=dtype))

    def forward(self, a: float | None = None, b: float | None = None) -> Tensor:
        pairs = [(a, self.a), (b, self.b)]
        return sum(
            coefficient * vector.sum() for coefficient, vector in pairs if coefficient is not None
        )
