"""What DeepSpeed's callers do with parameters at stage 3, on two ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import ranks
import zerort
from training import keep
from zerort.compat.deepspeed.stage3 import unwrap_model_for_generation
from zerort.compat.deepspeed.start import initialize

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 4},
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def answers(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (p.ds_status.name, tuple(p.ds_shape), p.ds_numel, p.ds_id == id(p), p.ds_persist)
        for p in model.parameters()
    ]


def use(rank: int, world: int) -> dict[str, Any]:
    with zerort.zero.Init(config_dict_or_path=CONFIG):
        model = nn.Linear(8, 4)
    found: dict[str, Any] = {"born": answers(model)}
    with zerort.zero.GatheredParameters(list(model.parameters()), modifier_rank=1):
        found["whole"] = answers(model)
        if rank == 1:
            nn.init.zeros_(model.weight)
    twin = copy.deepcopy(model)
    with zerort.zero.GatheredParameters(list(twin.parameters())):
        found["twin"] = answers(twin)
        found["zero"] = not twin.weight.any()
    engine = initialize(model=model, config=CONFIG)[0]
    keep(engine)
    found["engine"] = answers(model)
    x = torch.ones(2, 8)
    with unwrap_model_for_generation(engine) as unwrapped, torch.no_grad():
        found["unwrapped"] = answers(model), unwrapped is engine
        # how often, and whether at all, a rank generates is its own affair
        found["generated"] = [unwrapped(x).shape for _ in range(rank)]
    for _ in range(2):
        engine.backward(engine(x).sum())
        engine.step()
    with zerort.zero.GatheredParameters(model.weight):
        found["trained"] = bool((model.weight < 0).all())
    return found


def test_parameters_answer_whether_they_are_whole_or_in_parts() -> None:
    for found in ranks.run(2, use):
        sharded = [
            ("NOT_AVAILABLE", (4, 8), 32, True, False),
            ("NOT_AVAILABLE", (4,), 4, True, False),
        ]
        assert found["born"] == sharded
        whole = [("AVAILABLE", *rest) for _, *rest in sharded]
        assert found["whole"] == found["twin"] == whole
        stays = ("AVAILABLE", (4,), 4, True, True)  # at most the threshold
        assert found["engine"] == [sharded[0], stays]
        assert found["unwrapped"] == ([whole[0], stays], True)
        assert found["zero"] and found["trained"]
