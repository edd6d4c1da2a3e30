"""Engines over `Terms`, for tests that know the answer in closed form: no twin, no tolerance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import zerort
from models import Terms

Weights = tuple[float, float]

DEFAULTS: dict[str, Any] = {"reduce_bucket_size": 1, "stage": 0}
"""zero_optimization where the configuration does not say: a scenario that holds at every stage
leaves the stage out.
"""


def at_each_stage(rank: int, world: int, chosen: int, scenario: Callable[[int, int], None]) -> None:
    """Runs a scenario at the stage `chosen`."""
    before = DEFAULTS["stage"]
    DEFAULTS["stage"] = chosen
    scenario(rank, world)
    DEFAULTS["stage"] = before


def engine_over_terms(
    changes: Mapping[str, Any] | None = None, accumulation: int = 1, **arguments: Any
) -> Any:
    """SGD at rate 1 without clipping, one parameter a bucket; `changes` replace sections of the
    configuration.
    """
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        **(changes or {}),
    }
    config["zero_optimization"] = {
        **DEFAULTS,
        "stage3_param_persistence_threshold": 0,
        **config.get("zero_optimization", {}),
    }
    model = arguments.pop("model", None) or Terms()
    if "optimizer" not in arguments and "optimizer" not in config:
        arguments["optimizer"] = torch.optim.SGD(model.parameters(), lr=1.0)
    return zerort.initialize(model=model, config=config, **arguments)[0]


def weights(engine: Any) -> Weights:
    """(a, b), on all ranks together; each vector's elements must be equal."""
    with zerort.zero.GatheredParameters([engine.module.a, engine.module.b]):
        a, b = (vector.detach().float().clone() for vector in (engine.module.a, engine.module.b))
    assert a.min() == a.max() and b.min() == b.max()
    return a[0].item(), b[0].item()


def step_with(engine: Any, a: float | None = None, b: float | None = None) -> Weights:
    """One micro-batch with these coefficients, and its step; the weights afterwards."""
    engine.backward(engine(a, b))
    engine.step()
    return weights(engine)
