"""Sparse gradients: refused with their module's name, or made dense as soon as they exist."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from zerort.errors import PlanError

__all__ = ["settle"]


def settle(module: nn.Module, policy: Literal["refuse", "densify"]) -> None:
    """Looks for embeddings with sparse=True. Raises `PlanError` naming the first, or densifies their gradients.

    A dense gradient costs the embedding's full size in memory and on the wire, which is why it has to be asked for.
    """
    for name, part in module.named_modules():
        if not getattr(part, "sparse", False) or not isinstance(part, nn.Embedding | nn.EmbeddingBag):
            continue
        if policy == "refuse":
            raise PlanError(
                f"module {name} has sparse=True, and flat buffers carry dense gradients only: set sparse=False, or "
                'configure "zerort": {"sparse_gradients": "densify"}'
            )
        if part.weight.requires_grad:
            part.weight.register_hook(_densified)  # type: ignore[no-untyped-call]


def _densified(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
