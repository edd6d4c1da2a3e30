"""The eigenvalue of largest magnitude of a symmetric matrix that is known by its products alone.

Mirrors DeepSpeed's loop: it ends when the estimate changes by less than `tol`, relative, so that at
a coarse `tol` it is an estimate that depends on the start, and may stop at another eigenvalue. Sums
are in fp64, vectors in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zerort.config.quantize import Eigenvalue

__all__ = ["finite", "relative", "start_of", "top_eigenvalue"]

SEED = 0


def start_of(shapes: Sequence[torch.Size], seed: int = SEED) -> Tensor:
    """The start for parameters of these shapes, flat (n,) in fp32 on the CPU: the same on every
    rank and for every block. No generator of the process is moved.
    """
    drawn = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(shape, generator=drawn).flatten() for shape in shapes])


def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, settings: Eigenvalue
) -> float:
    """`product` gives the matrix times a vector, (n,) as `start`. Raises what it raises."""
    vector = _normalised(start, settings.stability)
    eigenvalue, before = 1.0, 0.0
    for _ in range(settings.max_iter):
        if not abs(eigenvalue) > 0 or not abs((eigenvalue - before) / eigenvalue) >= settings.tol:
            break
        image = finite(product(vector))
        before, eigenvalue = eigenvalue, float(image.double() @ vector.double())
        vector = _normalised(image, settings.stability)
    return eigenvalue


def _normalised(vector: Tensor, stability: float) -> Tensor:
    return finite(vector / (float(vector.double().norm()) + stability))


def finite(vector: Tensor) -> Tensor:
    """`vector`, with 0 for NaN and infinities."""
    return torch.nan_to_num(vector, nan=0.0, posinf=0.0, neginf=0.0)


def relative(eigenvalues: Sequence[float]) -> list[float]:
    """Magnitudes over the largest one. One of exactly 0, or that is not finite, counts as the most
    sensitive: 1.
    """
    sizes = [abs(value) if abs(value) < float("inf") else 0.0 for value in eigenvalues]
    largest = max(sizes, default=0.0)
    return [size / largest if size else 1.0 for size in sizes]
