"""Sparse gradients: refused with their module's name, or dense from the start where that is asked
for.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from zerort.errors import PlanError

__all__ = ["settle"]


def settle(module: nn.Module, policy: Literal["refuse", "densify"]) -> None:
    """Looks for embeddings with sparse=True. Raises `PlanError` naming the first, or sets
    sparse=False.

    A dense gradient costs the embedding's full size in memory and on the wire, which is why it has
    to be asked for.
    """
    for name, part in module.named_modules():
        if not getattr(part, "sparse", False) or not isinstance(
            part, nn.Embedding | nn.EmbeddingBag
        ):
            continue
        if policy == "refuse":
            raise PlanError(
                f"module {name} has sparse=True, and flat buffers carry dense gradients only: set "
                'sparse=False, or configure "zerort": {"sparse_gradients": "densify"}'
            )
        part.sparse = False
