"""A small problem whose gradients differ much in size, and engines that send them as bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import zerort

RATE = 0.1


class Hills(nn.Module):
    """Half the squared distance from targets of this rank's own, some of them far away, and from
    other ones in every micro-batch.
    """

    SHAPES = ((24, 40), (37, 21), (30,))

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.zeros(shape) for shape in self.SHAPES)
        self.rank = rank

    def targets(self, step: int, micro: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step + 100 * micro + 10_000 * self.rank)
        found = [torch.randn(shape, generator=generator) for shape in self.SHAPES]
        for target in found:
            target.view(-1)[::50] *= 30
        return found

    def forward(self, step: int, micro: int) -> Tensor:
        pairs = zip(self.params, self.targets(step, micro), strict=True)
        return sum(0.5 * (weight - target).square().sum() for weight, target in pairs)


@dataclass(frozen=True)
class Variant:
    stage: int
    gas: int
    feedback: Any = "auto"
    transport: str = "auto"
    zero: dict[str, Any] = field(default_factory=dict, hash=False)
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    def engine(self, rank: int) -> Any:
        model = Hills(rank)
        whole = {"stage3_param_persistence_threshold": 0} if self.stage == 3 else {}
        zero = {"stage": self.stage, "reduce_bucket_size": 900, **whole, **self.zero}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.gas,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zerort": {
                "wire": "int8",
                "wire_error_feedback": self.feedback,
                "transport": self.transport,
            },
            **self.more,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        return zerort.initialize(model=model, optimizer=optimizer, config=config)[0]


def take_step(engine: Any, step: int, gas: int = 1) -> None:
    for micro in range(gas):
        engine.backward(engine(step, micro))
        engine.step()


def weights_of(engine: Any) -> list[Tensor]:
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]
