"""Products with the Hessian of a loss over a block's parameters, on this rank.

Second derivatives are those of the gradients, which is why their graph is needed. What they do not
depend on has a product of 0. `.grad` is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Hessian", "gradients_of"]


def gradients_of(kept: Sequence[Tensor], params: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Of the kept losses' sum; None where there is none, or none that has a graph."""
    trained = [parameter for parameter in params if parameter.requires_grad]
    if not kept or not trained:
        return [None] * len(params)
    found = iter(torch.autograd.grad(kept, trained, create_graph=True, allow_unused=True))
    gradients = [next(found) if parameter.requires_grad else None for parameter in params]
    return [each if each is not None and each.requires_grad else None for each in gradients]


@dataclass(frozen=True)
class Hessian:
    """A block's, by its parameters and this rank's gradients of them; None for one that has none
    here.
    """

    params: Sequence[nn.Parameter]
    gradients: Sequence[Tensor | None]

    @classmethod
    def of(cls, pairs: Sequence[tuple[nn.Parameter, Tensor | None]]) -> Hessian:
        """Of a block's parameters that have a gradient on some rank."""
        return cls([parameter for parameter, _ in pairs], [gradient for _, gradient in pairs])

    def times(self, vector: Tensor) -> Tensor:
        """This rank's product with `vector`, both flat (n,) in fp32 on the CPU."""
        pieces = torch.split(vector, [parameter.numel() for parameter in self.params])
        pairs = [
            (gradient, piece.reshape(gradient.shape).to(gradient))
            for gradient, piece in zip(self.gradients, pieces, strict=True)
            if gradient is not None
        ]
        if not pairs:
            return torch.zeros_like(vector)
        trained = [parameter for parameter in self.params if parameter.requires_grad]
        found = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            trained,
            [piece for _, piece in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        images = {id(p): image for p, image in zip(trained, found, strict=True)}
        return torch.cat([_on_host(images.get(id(p)), p.numel()) for p in self.params])


def _on_host(image: Tensor | None, numel: int) -> Tensor:
    return torch.zeros(numel) if image is None else image.detach().flatten().float().cpu()
