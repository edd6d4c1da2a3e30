"""Six vectors, two a bucket, and a loss that is linear in them: the weights tell exactly which
gradients were applied.

What happens in a micro-batch is written as a line: a digit is the vector whose gradient came, a bar
is a bucket that left. `54|32|10|` is a backward under which every bucket left when it was full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ranks
import zerort

VECTORS = 6
ELEMENTS = 16
FORWARD = (0, 1, 2, 3, 4, 5)
"""Gradients arrive the other way round: the sentinels are 4, 2 and 0."""
SWAPPED = (0, 1, 2, 3, 5, 4)
"""4 comes before 5."""


class Vectors(nn.Module):
    """Zeros, which SGD at rate 1 takes to minus their gradients: vector i's is i + 1 a use.

    With `reentrant` each use is a segment of its own, whose gradient is accumulated when it is
    recomputed.
    """

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(VECTORS))
        self.reentrant = reentrant

    def forward(self, order: Sequence[int], x: Tensor | None = None) -> Tensor:
        total = torch.zeros((), requires_grad=True) if x is None else x
        for index in order:
            use = (
                partial(checkpoint, self._add, use_reentrant=True) if self.reentrant else self._add
            )
            total = use(total, index)
        return total

    def _add(self, total: Tensor, index: int) -> Tensor:
        return total + (index + 1) * self.vectors[index].sum()


class Scene:
    """An engine over `Vectors`, and the line of what happened last."""

    def __init__(
        self, stage: int = 2, gas: int = 1, model: Vectors | None = None, **sections: Any
    ) -> None:
        self.line = ""
        self.model = model or Vectors()
        for index, parameter in enumerate(self.model.vectors):
            parameter.register_hook(lambda _, index=index: self._note(str(index)))
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": gas,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 2 * ELEMENTS},
            **sections,
            # whose launches are seen
            "zerort": {"transport": "gloo", **sections.get("zerort", {})},
        }
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.engine, *_ = zerort.initialize(model=self.model, optimizer=optimizer, config=config)

    def _note(self, event: str) -> None:
        self.line += event

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within, launches are noted too."""
        self.line = ""
        original = dist.all_to_all_single

        def launch(*args: Any, **options: Any) -> Any:
            self._note("|")
            return original(*args, **options)

        with mock.patch.object(dist, "all_to_all_single", launch):
            yield

    def step(self, order: Sequence[int] = FORWARD, *, direct: bool = False) -> str:
        """One micro-batch and its `step`: what happened."""
        with self.noting():
            loss = self.engine(order)
            if direct:
                loss.backward()
            else:
                self.engine.backward(loss)
            self.engine.step()
        return self.line

    def steps(self, *orders: Sequence[int]) -> list[str]:
        """What happened in each."""
        return [self.step(order) for order in orders]

    def uses(self) -> list[float]:
        """How many uses of each vector were applied, in all."""
        return [-float(v.detach()[0]) / (i + 1) for i, v in enumerate(self.model.vectors)]

    def hooked(self) -> list[int]:
        """The vectors that have a hook of the engine's behind accumulation."""
        return [
            index
            for index, vector in enumerate(self.model.vectors)
            if vector._post_accumulate_grad_hooks
        ]


def both(scenario: Callable[..., Any], *args: Any) -> Any:
    """What two ranks agree on."""
    first, second = ranks.shared(2, scenario, *args)
    assert first == second
    return first
