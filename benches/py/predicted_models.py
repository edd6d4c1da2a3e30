"""The models of `predict.py`, and one race: a step's measured time beside its prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import zerort
from naps import Nap
from workloads import GPT, Shape, next_token_loss
from zerort.tune.findings import wire_line
from zerort.tune.fit import Line
from zerort.tune.model import Predictor
from zerort.tune.profile import Observer, slowest
from zerort.tune.wire import Wire, measure_wire

__all__ = ["MODELS", "Raced", "race"]

_SMALL = Shape(vocabulary=512, context=64, width=256, depth=4, heads=4)
_WARM, _STEPS = 3, 2


class Raced(NamedTuple):
    """A step, in seconds."""

    predicted: float
    measured: float
    exposed: tuple[float, float]
    """Predicted and measured, of the step."""
    overlapped: bool
    """Whether updated parameters arrive beside the next forward."""
    wire: str
    """As it was measured."""


class Paced(nn.Module):
    """`module` on its inputs, after a while in which no core is used."""

    def __init__(self, module: nn.Module, seconds: float) -> None:
        super().__init__()
        self.module, self.seconds = module, seconds

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """As the module's."""
        out: Tensor = self.module(Nap.apply(x, self.seconds, 2 * self.seconds), *others)
        return out


class _Training:
    """A model and one micro-batch's loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        self.model, self.loss = model, loss


def _gpt(*, paced: bool) -> _Training:
    """3.4 million parameters."""
    size, length = (1, 9) if paced else (4, 65)
    tokens = torch.randint(512, (size, length))
    model = GPT(_SMALL)
    if paced:
        model.blocks = nn.ModuleList(Paced(block, 0.02) for block in model.blocks)

    def loss(engine: Any) -> Tensor:
        return next_token_loss(engine(tokens[:, :-1]), tokens[:, 1:])

    return _Training(model, loss)


def _wide(*, paced: bool) -> _Training:
    """4.2 million parameters in 4 matrices, each a bucket."""
    linear = [nn.Linear(1024, 1024) for _ in range(4)]
    layers = [Paced(layer, 0.02) for layer in linear] if paced else linear
    return _in_a_row(layers, batch=4 if paced else 128, width=1024)


def _paced(*, paced: bool) -> _Training:
    """2.1 million parameters in 32 layers of 3 ms forward."""
    return _in_a_row([Paced(nn.Linear(256, 256), 0.003) for _ in range(32)], batch=4, width=256)


def _in_a_row(layers: Sequence[nn.Module], *, batch: int, width: int) -> _Training:
    x = torch.randn(batch, width)
    return _Training(nn.Sequential(*layers), lambda engine: engine(x).square().mean())


MODELS: dict[str, Callable[..., _Training]] = {"gpt": _gpt, "wide": _wide, "paced": _paced}


def race(build: Callable[..., _Training], stage: int, bucket: int, rounds: int) -> Raced:
    """A step at a stage."""
    torch.manual_seed(0)
    training = build(paced=dist.get_world_size() > (os.cpu_count() or 1))
    engine, *_ = zerort.initialize(
        model=training.model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": None,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": stage},
            # hosts that are namespaces share a kernel's memory and its name
            "zerort": {"bucket_bytes": bucket, "transport": "gloo", "hierarchy": "flat"},
        },
    )
    parts = engine._parts
    overlap = parts.boundary.overlap

    def step() -> None:
        engine.backward(training.loss(engine))
        engine.step()

    def measured() -> Wire:
        parts.reduction.land()
        return measure_wire(parts.mesh)

    warm = 0
    while warm < _WARM or not overlap.is_decided:
        step()
        warm += 1
    overlapped = overlap.decide()
    observer, wires = Observer(parts), [measured()]
    for number in range(rounds):
        if number == rounds // 2:
            wires.append(measured())
        parts.reduction.land()
        dist.barrier()
        if overlapped:
            step()  # the next begins with what this one has sent
        for _ in range(_STEPS):
            observer.start()
            step()
            observer.crossed()
    observer.close()
    wires.append(measured())
    profiles = [None] * dist.get_world_size()
    dist.all_gather_object(profiles, observer.profile())
    profile = slowest(profiles)
    wire = middle(wires)
    plan, threshold = parts.reduction.plan, overlap.threshold
    predictor = Predictor(wire, profile, plan, blocks=True, sums_pieces=True, overlap=threshold)
    prediction = predictor.prediction(plan)
    engine.destroy()
    exposed = prediction.communication_ns / 1e9, profile.exposed
    return Raced(prediction.total_ns / 1e9, profile.wall, exposed, overlapped, wire_line(wire))


def middle(wires: Sequence[Wire]) -> Wire:
    """Of several measurements, the median of each figure."""

    def line(lines: Sequence[Line]) -> Line:
        return Line(median(line.alpha for line in lines), median(line.beta for line in lines))

    return Wire(
        wires[0].ranks,
        line([wire.reduce for wire in wires]),
        line([wire.gather for wire in wires]),
        median(wire.vote for wire in wires),
        wires[0].lanes,
        median(wire.start_reduce for wire in wires),
        median(wire.start_gather for wire in wires),
    )
