"""What modules cost, as plain numbers: a tree beside the model's, and the largest by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from zerort.profiling.recording import Recording

__all__ = ["Cost", "Node", "largest", "levels", "tree"]


@dataclass(frozen=True)
class Cost:
    """Of one module and all below it."""

    params: int
    """Elements of its parameters, each once; where ranks hold parts, of the whole."""
    flops: int
    """Of the forwards that were recorded."""
    seconds: float
    """In them."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates; each is two floating-point operations."""
        return self.flops // 2

    @property
    def rate(self) -> float:
        """Flops a second; 0 where nothing was timed."""
        return self.flops / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Node:
    """A module with its cost."""

    name: str
    """In its parent; the root's is empty."""
    module: nn.Module
    cost: Cost
    children: tuple[Node, ...]


def tree(model: nn.Module, recording: Recording) -> Node:
    """The costs of `model` and everything in it, as the model is built: a module that stands in it
    twice has two nodes, of the same cost.
    """
    return _node("", model, recording)


def cost(module: nn.Module, recording: Recording) -> Cost:
    """Of one module."""
    params = sum(parameter.numel() for parameter in module.parameters())
    return Cost(params, recording.flops(module), recording.seconds(module))


def levels(root: Node) -> list[list[Node]]:
    """The nodes at each depth, from the root down."""
    found, level = [], [root]
    while level:
        found.append(level)
        level = [child for node in level for child in node.children]
    return found


def largest(
    nodes: list[Node], by: Callable[[Cost], float], most: int
) -> Iterator[tuple[str, float]]:
    """(class, sum over its nodes) of the `most` classes that cost most."""
    sums: dict[str, float] = {}
    for node in nodes:
        name = type(node.module).__name__
        sums[name] = sums.get(name, 0) + by(node.cost)
    yield from sorted(sums.items(), key=lambda item: item[1], reverse=True)[:most]


def _node(name: str, module: nn.Module, recording: Recording) -> Node:
    children = tuple(
        _node(inner, child, recording)
        for inner, child in module._modules.items()
        if child is not None
    )
    return Node(name, module, cost(module, recording), children)
