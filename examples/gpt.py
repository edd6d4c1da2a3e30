"""A compact GPT: pre-norm blocks, causal attention by `scaled_dot_product_attention`, rotary
positions.

It knows nothing of ranks, gradients or optimizers. The output layer starts at zero, so an untrained
model gives every token the same probability and its loss is exactly the logarithm of the vocabulary
size: 8 bits for bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT."""

    vocabulary: int = 256
    context: int = 128
    width: int = 128
    depth: int = 4
    heads: int = 4


class Attention(nn.Module):
    """Causal self-attention, (batch, time, width) -> the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            rotate(q, rotation), rotate(k, rotation), v, is_causal=True
        )
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention and a four times wider perceptron, each behind its norm and beside the residual
    stream.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
        )

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token ids (batch, time) -> logits (batch, time, vocabulary)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.register_buffer("rotation", rotations(shape), persistent=False)
        self._initialise()

    def forward(
        self, tokens: Tensor, progressive_layer_drop: bool = False, pld_theta: float = 1.0
    ) -> Tensor:
        """With `progressive_layer_drop` (arXiv 2010.13369) block i of L, from 1, is kept with
        probability 1 - i/L (1 - pld_theta), drawn from torch's generator on the CPU: alike on ranks
        that are seeded alike, as stage 3 needs it.
        """
        x = self.token(tokens)
        rotation = self.rotation[:, : tokens.shape[1]].to(x.dtype)
        for number, block in enumerate(self.blocks, 1):
            kept = 1 - number / self.shape.depth * (1 - pld_theta)
            if not progressive_layer_drop or torch.rand(()).item() < kept:
                x = block(x, rotation)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, temperature: float = 0.7) -> Tensor:
        """Continues `prompt`, (batch, time) token ids, by `length` tokens drawn one at a time."""
        tokens = prompt
        for _ in range(length):
            logits = self(tokens[:, -self.shape.context :])[:, -1].float()
            drawn = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            tokens = torch.cat((tokens, drawn), dim=1)
        return tokens

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # What a block adds to the stream starts small, so that depth does not raise the variance
        # (GPT-2).
        for block in self.blocks:
            for last in (block.attention.out, block.mlp[-1]):
                nn.init.normal_(last.weight, std=0.02 / (2 * self.shape.depth) ** 0.5)
        nn.init.normal_(self.token.weight, std=0.3)
        nn.init.zeros_(self.head.weight)


def rotations(shape: Shape) -> Tensor:
    """Cosines and sines by which positions turn pairs of features, (2, context, head width / 2)
    fp32 (RoPE).
    """
    half = shape.width // shape.heads // 2
    speeds = 1000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(shape.context).unsqueeze(1) * speeds
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns feature i of each head, (..., time, head width), against feature i + half by its
    position's angle.
    """
    (cos, sin), (a, b) = rotation, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of `logits` (batch, time, vocabulary) against `targets` (batch,
    time).
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
