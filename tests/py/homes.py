"""Training with what is at home on the host, on the machine that stands in for an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zerort
from stand_in import Machine, Simulated
from training import keep

__all__ = ["BOTH", "OPTIMIZER", "PARAM", "Ran", "Setting", "data", "engine_of", "train", "weights"]

OPTIMIZER = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
PARAM = {"offload_param": {"device": "cpu", "pin_memory": True}}
BOTH = {**OPTIMIZER, **PARAM}
WIDTH = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    stage: int
    dtype: str = "fp32"
    gas: int = 1
    steps: int = 3
    optimizer: str = "AdamW"
    frozen: bool = False
    """The first layer trains from the second step on only, and the last no more."""
    overflows: int = -1
    """The step whose loss is infinite."""
    low_masters: bool = False
    """Masters and states are bf16, too."""

    def config(self, zero: dict[str, Any]) -> dict[str, Any]:
        precision: Any = {} if self.dtype == "fp32" else {self.dtype: {"enabled": True}}
        if self.low_masters:
            precision["bf16"] |= {"bf16_master_weights_and_grads": True}
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.gas,
            "gradient_clipping": 0.5,
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2}},
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 2 * WIDTH * WIDTH,
                "stage3_param_persistence_threshold": WIDTH,
                **zero,
            },
            **precision,
        }


@dataclass
class Ran:
    """What came of it, on one rank."""

    weights: list[Tensor]
    norms: list[float]
    races: list[Any]
    syncs: list[list[str]]
    """What the host waited for, by step: `backward` is a name of its own between."""
    engine: Any
    machine: Machine


def engine_of(setting: Setting, zero: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    model = nn.Sequential(layers[0], nn.ReLU(), *layers[1:])
    return zerort.initialize(model=model, config=setting.config(zero))[0]


def data(setting: Setting, rank: int) -> Tensor:
    shape = setting.steps, setting.gas, 2, WIDTH
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(
        DTYPES[setting.dtype]
    )


def weights(engine: Any) -> list[Tensor]:
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        return [p.detach().clone() for p in engine.module.parameters()]


def _nothing(engine: Any, step: int) -> None:
    pass


def train(
    setting: Setting,
    zero: dict[str, Any],
    rank: int = 0,
    between: Callable[[Any, int], None] = _nothing,
    machine: Machine | None = None,
    comms: Simulated | None = None,
) -> Ran:
    """Some steps; `between` is called behind each with the engine and the step's number."""
    machine = machine or Machine()
    syncs, norms = [], []
    with machine.running(comms):
        engine, inputs = engine_of(setting, zero), data(setting, rank)
        for step in range(setting.steps):
            if setting.frozen:
                engine.module[0].requires_grad_(step > 0)
                engine.module[-1].requires_grad_(step == 0)
            before = len(machine.syncs)
            for micro in range(setting.gas):
                loss = engine(inputs[step, micro]).float().square().mean()
                if step == setting.overflows:
                    loss = loss * float("inf")
                within = len(machine.syncs)
                engine.backward(loss)
                if len(machine.syncs) > within:
                    machine.syncs.append("backward")
                engine.step()
            syncs.append(machine.syncs[before:])
            norms.append(float(engine.get_global_grad_norm()))
            between(engine, step)
        found = weights(engine)
        keep(engine)
    return Ran(found, norms, machine.races, syncs, engine, machine)
